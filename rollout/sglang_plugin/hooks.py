"""The hooks: what is done around which of SGLang's methods. Every one passes SGLang's own result on unchanged."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np

from r3.rollout.provenance import KEY
from r3.rollout.sglang_plugin.ledger import Ledger

logger = logging.getLogger(__name__)

# Attributes that the plugin puts on SGLang's objects.
_FORWARD = "r3_forward"  # on a pending capture output and on a batch result: the number of their pass
_TOKENS = "r3_token_forwards"  # on a request: the pass behind each of its output tokens

# Server arguments under which rows reach KV slots by other ways than a forward pass of this process, or under which a
# scheduler step is not one pass.
UNSUPPORTED = (
    "disaggregation_mode", "enable_hierarchical_cache", "enable_lmcache", "enable_hisparse", "enable_pdmux",
    "enable_two_batch_overlap", "speculative_algorithm", "dllm_algorithm", "pp_size",
)  # fmt: skip


class Hooks:
    """All hooks of one scheduler process, over one ledger; `SGLang name -> method` in `plugin.POINTS`."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._current = 0
        self._gathered: np.ndarray[Any, np.dtype[np.int32]] | None = None
        self._seen_scheduler = False

    def run_batch(self, original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        """Put the number of the pass on the result; 0 when the step was not exactly one pass."""
        if not self._seen_scheduler:
            self.look_at(scheduler)
        before = self._ledger.forward
        result = original(scheduler, *args, **kwargs)
        if result is not None and self._ledger.active:
            setattr(result, _FORWARD, self._ledger.forward if self._ledger.forward == before + 1 else 0)
        return result

    def look_at(self, scheduler: Any) -> None:
        """Learn the first weights' name and refuse layouts in which a stamp would prove nothing."""
        self._seen_scheduler = True
        arguments = scheduler.server_args
        self._ledger.label_weights(str(arguments.weight_version))
        found = {name: getattr(arguments, name, None) for name in UNSUPPORTED}
        wrong = [f"{name}={value!r}" for name, value in found.items() if not _is_neutral(name, value)]
        if wrong and self._ledger.refusal is None:
            refuse(self._ledger, f"{', '.join(wrong)}: rows of a KV slot may then be written without a forward pass")

    def on_forward_end(self, original: Callable[..., Any], capturer: Any, *args: Any, **kwargs: Any) -> Any:
        """Number the pass; stamp its slots at once, or leave the number on the output that is finalized later."""
        pending = original(capturer, *args, **kwargs)
        if not self._ledger.active or not _captures_routing(capturer):
            return pending
        forward = self._ledger.begin_forward()
        if pending is not None:
            setattr(pending, _FORWARD, forward)
            return pending
        batch = kwargs["forward_batch"] if "forward_batch" in kwargs else args[0]
        slots = getattr(batch, "out_cache_loc_virtual", None)
        slots = batch.out_cache_loc if slots is None else slots
        self._ledger.stamp(slots.cpu().numpy(), forward, capturer.host_cache.num_tokens)
        return pending

    def finalize(self, original: Callable[..., Any], pending: Any) -> None:
        """Stamp the slots whose rows are being written, with the number of the pass that made them."""
        original(pending)
        forward = getattr(pending, _FORWARD, None)
        if forward is not None and self._ledger.active:
            self._ledger.stamp(pending.out_cache_loc.cpu().numpy(), forward, pending.host_cache.num_tokens)

    def get_topk(self, original: Callable[..., Any], capturer: Any, *args: Any, **kwargs: Any) -> Any:
        """Gather the stamps of the slots whose rows are being gathered."""
        rows = original(capturer, *args, **kwargs)
        if self._ledger.active and _captures_routing(capturer):
            self._gathered = self._ledger.stamps_of(_slots(*args, **kwargs))
        return rows

    def process_result(self, original: Callable[..., Any], processor: Any, batch: Any, result: Any) -> Any:
        """Note the pass behind every output token that SGLang commits while it processes a batch's result."""
        self._current = getattr(result, _FORWARD, 0)
        requests = list(batch.reqs) if self._ledger.active else []
        outcome = original(processor, batch, result)
        for request in requests:
            self._note_tokens(request)
        self._current = 0
        return outcome

    def collect(self, original: Callable[..., Any], processor: Any, request: Any) -> Any:
        """Add the stamps to a finished request, beside its rows."""
        self._gathered = None
        outcome = original(processor, request)
        rows, self._gathered = self._gathered, None
        if rows is None or request.routed_experts is None:
            return outcome
        self._note_tokens(request)
        length = len(request.output_ids_through_stop)
        tokens = np.array(getattr(request, _TOKENS)[:length], dtype=np.int32)
        if length and tokens.all():
            # SGLang slices such values like output tokens, so the last place is part of the last message.
            values: list[Any] = [None] * (length - 1) + [self._ledger.statement(rows, tokens)]
            request.customized_info = {**(request.customized_info or {}), KEY: values}
        return outcome

    def update_weights(self, original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any) -> Any:
        """Count the update, also one that failed half-way, and learn the new weights' name."""
        outcome = original(updater, *args, **kwargs)
        request = kwargs["recv_req"] if "recv_req" in kwargs else args[0]
        self._ledger.weights_changed()
        label = getattr(request, "weight_version", None)
        if label is not None and outcome_succeeded(outcome):
            self._ledger.label_weights(str(label))
        return outcome

    def relabel_weights(self, original: Callable[..., Any], scheduler: Any, new_version: Any) -> Any:
        """Learn a name that is given without an update."""
        outcome = original(scheduler, new_version)
        if new_version is not None:
            self._ledger.label_weights(str(new_version))
        return outcome

    def switch(self, scheduler: Any, enabled: bool) -> None:
        """Start or stop stamping; SGLang's `collective_rpc` calls it. Raises `RuntimeError` with the refusal."""
        if not self._seen_scheduler:
            self.look_at(scheduler)
        self._ledger.enabled = enabled
        if enabled and self._ledger.refusal is not None:
            raise RuntimeError(self._ledger.refusal)

    def _note_tokens(self, request: Any) -> None:
        if not request.return_routed_experts:
            return
        noted = getattr(request, _TOKENS, None)
        if noted is None:
            noted = array("i")
            setattr(request, _TOKENS, noted)
        new = len(request.output_ids) - len(noted)
        if new > 0:
            noted.extend([self._current] * new)
        elif new < 0:
            del noted[new:]  # SGLang throws the output of a retracted request with input embeddings away


def refuse(ledger: Ledger, reason: str) -> None:
    """Stop stamping for good and say why, in one line."""
    ledger.refusal = reason
    logger.warning("r3_provenance: no routing row is stamped, provenance stays unknown: %s", reason)


def outcome_succeeded(outcome: Any) -> bool:
    """Did a weight update, as SGLang reports it, replace the weights? A refused flush does not undo that."""
    return bool(getattr(outcome, "success", False)) or "not flushed" in str(getattr(outcome, "message", ""))


def _is_neutral(name: str, value: Any) -> bool:
    return value in (None, False, "", "null", "none") or (name == "pp_size" and value == 1)


def _captures_routing(capturer: Any) -> bool:
    from sglang.srt.state_capturer.routed_experts import RoutedExpertsCapturer

    return isinstance(capturer, RoutedExpertsCapturer)


def _slots(req_pool_idx: int, seqlen: int, req_to_token_pool: Any, start_len: int = 0) -> Any:
    """The slots that `BaseTopkCapturer.get_topk` reads, by its own parameters."""
    begin = min(start_len, seqlen - 1)
    return req_to_token_pool.req_to_token[req_pool_idx][begin : seqlen - 1].cpu().numpy()
