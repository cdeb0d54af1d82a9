"""The hooks: what is done around which of SGLang's methods."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from r3.rollout.provenance import KEY
from r3.rollout.segment import Ticket
from r3.rollout.sglang_plugin.client import NOT_COMPARED
from r3.rollout.sglang_plugin.ledger import Ledger
from r3.rollout.sglang_plugin.onecopy import OneCopy
from r3.rollout.sglang_plugin.returns import Returns, Statement
from r3.rollout.sglang_plugin.rows import RowStore, narrowed
from r3.rollout.sglang_plugin.tickets import TICKET_KEY

logger = logging.getLogger(__name__)

# Attributes that the plugin puts on SGLang's objects.
_FORWARD = "r3_forward"  # on a pending capture output and on a batch result: the number of their pass
_JOBS = "r3_jobs"  # on a pending capture output: the returns that were queued when its pass was launched
_TOKENS = "r3_token_forwards"  # on a request: the pass behind each of its output tokens
_STORE = "r3_store"  # on SGLang's host cache: the rows, in its buffer's place

# Server arguments under which rows reach KV slots by other ways than a forward pass of this process, or under which a
# scheduler step is not one pass.
UNSUPPORTED = (
    "disaggregation_mode", "enable_hierarchical_cache", "enable_lmcache", "enable_hisparse", "enable_pdmux",
    "enable_two_batch_overlap", "speculative_algorithm", "dllm_algorithm", "pp_size",
)  # fmt: skip


@dataclass(slots=True)
class _Finished:
    """A request whose rows are being collected: its sampled tokens' passes, and what `get_topk` made of its rows."""

    tokens: np.ndarray[Any, np.dtype[np.int32]]
    stamps: np.ndarray[Any, np.dtype[np.int32]] | None = None
    ticket: Ticket | None = None
    begin: int = 0
    rows: int = 0

    @property
    def is_stamped(self) -> bool:
        """Is the pass of each of its tokens known, and were its rows' gathered?"""
        return self.stamps is not None and bool(len(self.tokens)) and bool(self.tokens.all())


class Hooks:
    """All hooks of one scheduler process, over one ledger; `SGLang name -> method` in `plugin.POINTS`."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._current = 0
        self._finished: _Finished | None = None
        self._seen_scheduler = False
        self._num_experts: int | None = None
        self._store: RowStore | None = None
        self._returns: Returns | None = None
        self._one_copy = OneCopy()
        self._is_mute = False  # a rank that captures what others capture, and answers nobody

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

    def make_capturer(
        self, original: Callable[..., Any], capturer: Any, model_config: Any, *args: Any, **kw: Any
    ) -> Any:
        """Learn how many experts the model has before SGLang makes its buffers."""
        text = model_config.hf_text_config
        found = (getattr(text, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
        self._num_experts = next((value for value in found if isinstance(value, int)), None)
        return original(capturer, model_config, *args, **kw)

    def make_host_cache(
        self, original: Callable[..., Any], cache: Any, num_tokens: int, num_layers: int, topk_size: int, name: str,
        *args: Any, **kw: Any,
    ) -> Any:  # fmt: skip
        """Put compact rows where SGLang would pin an int32 buffer; on a rank that answers nobody, none at all."""
        if name != "routed_experts" or self._num_experts is None:
            return original(cache, num_tokens, num_layers, topk_size, name, *args, **kw)
        import torch

        self._is_mute = not _answers()
        store = RowStore(0 if self._is_mute else num_tokens, num_layers, topk_size, self._num_experts)
        setattr(cache, _STORE, store)
        self._store = None if self._is_mute else store
        cache.num_tokens, cache.num_layers, cache.topk_size, cache.name = num_tokens, num_layers, topk_size, name
        cache.buffer = torch.from_numpy(store.rows.view(np.uint8))  # what SGLang logs the size of, and nothing else
        cache._log_allocation()
        return None

    def drop_host_cache(self, original: Callable[..., Any], cache: Any) -> Any:
        """Let the rows go; they were never pinned."""
        if not hasattr(cache, _STORE):
            return original(cache)
        delattr(cache, _STORE)
        cache.buffer = None
        return None

    def capture(self, original: Callable[..., Any], cache: Any, layer_id: int, topk_indices: Any) -> None:
        """Keep a layer's ids for one copy of all."""
        self._one_copy.capture(original, cache, layer_id, topk_indices)

    def on_forward_end(
        self, original: Callable[..., Any], capturer: Any, forward_batch: Any, can_run_graph: Any = None,
        cuda_graph_batch: Any = None, no_copy_to_cpu: bool = False,
    ) -> Any:  # fmt: skip
        """Number the pass and narrow its ids; store both at once, or leave them on the output finalized later."""
        self._one_copy.end_pass()
        store = _store_of(capturer)
        if store is not None and self._is_mute:
            return None
        arguments = (forward_batch, can_run_graph, cuda_graph_batch)
        if store is None:
            pending = original(capturer, *arguments, no_copy_to_cpu=no_copy_to_cpu)
            return self._numbered(capturer, forward_batch, pending) if _captures_routing(capturer) else pending
        pending = original(capturer, *arguments, no_copy_to_cpu=True)
        pending.topk = narrowed(pending.topk, store.num_experts)
        setattr(pending, _JOBS, self._returns.submitted if self._returns is not None else 0)
        if self._ledger.active:
            setattr(pending, _FORWARD, self._ledger.begin_forward())
        if no_copy_to_cpu:
            return pending
        pending.map_device_tensors(lambda tensor: tensor.cpu())
        pending.finalize()
        return None

    def _numbered(self, capturer: Any, forward_batch: Any, pending: Any) -> Any:
        """Stamp the slots of a pass whose rows SGLang itself keeps."""
        if not self._ledger.active:
            return pending
        forward = self._ledger.begin_forward()
        if pending is not None:
            setattr(pending, _FORWARD, forward)
            return pending
        slots = getattr(forward_batch, "out_cache_loc_virtual", None)
        slots = forward_batch.out_cache_loc if slots is None else slots
        self._ledger.stamp(slots.cpu().numpy(), forward, capturer.host_cache.num_tokens)
        return None

    def finalize(self, original: Callable[..., Any], pending: Any) -> None:
        """Store the rows of a pass that is done, and the number of the pass beside them."""
        store = getattr(pending.host_cache, _STORE, None)
        if store is None:
            original(pending)
        else:
            if self._returns is not None:
                self._returns.settle(getattr(pending, _JOBS, 0))
            store.put(pending.out_cache_loc.numpy(), pending.topk.numpy())
        forward = getattr(pending, _FORWARD, None)
        if forward is not None and self._ledger.active:
            self._ledger.stamp(pending.out_cache_loc.cpu().numpy(), forward, pending.host_cache.num_tokens)

    def get_topk(
        self, original: Callable[..., Any], capturer: Any, req_pool_idx: int, seqlen: int, req_to_token_pool: Any,
        start_len: int = 0,
    ) -> Any:  # fmt: skip
        """Queue the rows of a finished request for shared memory and return None, or return them as SGLang does.

        Beside rows that are returned at once, their stamps are gathered.
        """
        store, finished = _store_of(capturer), self._finished
        if store is None:
            rows = original(capturer, req_pool_idx, seqlen, req_to_token_pool, start_len=start_len)
            if finished is not None and self._ledger.active and _captures_routing(capturer):
                table = _slots(req_pool_idx, seqlen, req_to_token_pool, start_len)
                finished.stamps = self._ledger.stamps_of(table.cpu().numpy())
            return rows
        if start_len < 0:
            raise ValueError(f"{start_len=} must be non-negative")
        table = _slots(req_pool_idx, seqlen, req_to_token_pool, start_len)
        if self._returns is not None and finished is not None and len(finished.tokens):
            finished.begin, finished.rows = start_len, int(table.shape[0])
            finished.ticket = self._returns.submit(table, len(finished.tokens), self._statement(finished))
            if finished.ticket is not None:
                return None
        return self._rows_now(store, table.cpu().numpy())

    def _rows_now(self, store: RowStore, slots: np.ndarray[Any, Any]) -> Any:
        import torch

        if self._finished is not None and self._ledger.active:
            self._finished.stamps = self._ledger.stamps_of(slots)
        # Only a client that takes tickets knows narrow ids; it gets them here when the segment is full.
        is_narrow = self._returns is not None and store.dtype == "uint8" and store.is_sound(slots)
        return torch.from_numpy(store.compact(slots) if is_narrow else store.stock(slots))

    def _statement(self, finished: _Finished) -> Statement | None:
        """Return what makes the stamps of a request's slots, None where its tokens have none."""
        ledger, tokens = self._ledger, finished.tokens
        if not ledger.active or not tokens.all():
            return None
        return lambda slots: ledger.statement_bytes(slots, tokens)

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
        """Add to a finished request the ticket of its rows, or the stamps beside rows that SGLang carries."""
        if self._is_mute or not request.return_routed_experts:
            return None
        self._finished = finished = _Finished(self._token_forwards(request))
        try:
            outcome = original(processor, request)
        finally:
            self._finished = None
        if finished.ticket is not None:
            self._attach(request, TICKET_KEY, [*finished.ticket, finished.begin, finished.rows])
        elif finished.is_stamped and request.routed_experts is not None:
            assert finished.stamps is not None
            self._attach(request, KEY, self._ledger.statement(finished.stamps, finished.tokens))
        return outcome

    def _token_forwards(self, request: Any) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Return the pass behind each output token of a finished request, 0 where it is not known."""
        length = len(request.output_ids_through_stop)
        if not self._ledger.active:
            return np.zeros(length, dtype=np.int32)
        self._note_tokens(request)
        return np.array(getattr(request, _TOKENS)[:length], dtype=np.int32)

    @staticmethod
    def _attach(request: Any, key: str, value: Any) -> None:
        # SGLang slices such values like output tokens, so the last place is part of the last message.
        values: list[Any] = [None] * (len(request.output_ids_through_stop) - 1) + [value]
        request.customized_info = {**(request.customized_info or {}), key: values}

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

    def switch_returns(self, scheduler: Any, path: str) -> None:
        """Return rows through the segment at `path` from now on; as SGLang does where it is empty.

        SGLang's `collective_rpc` calls it. Raises `RuntimeError` with the refusal.
        """
        if not self._seen_scheduler:
            self.look_at(scheduler)
        if self._returns is not None:
            self._returns.finish()
            self._returns = None
        if not path or self._is_mute:
            return
        if self._ledger.refusal is not None:
            raise RuntimeError(self._ledger.refusal)
        if self._store is None:
            raise RuntimeError("the engine captures no routing, or its model does not say how many experts it has")
        self._returns = Returns(self._store, path)

    def require_one_copy(self) -> None:
        """Raise `RuntimeError` with the reason where ids are copied layer by layer; `collective_rpc` calls it."""
        if not self._one_copy.layers:
            raise RuntimeError(self._one_copy.refusal or NOT_COMPARED)

    def on_pause(self, original: Callable[..., Any], scheduler: Any, *args: Any, **kw: Any) -> Any:
        """Gather what is queued where the engine rests: no pass may follow for long, and a client waits for it.

        Before, because an idle engine may sleep in there; behind, because a pause takes the results under way.
        """
        if self._returns is not None:
            self._returns.finish()
        outcome = original(scheduler, *args, **kw)
        if self._returns is not None:
            self._returns.finish()
        return outcome

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


def _answers() -> bool:
    """Does this rank send answers? Ranks that share every token capture the same rows."""
    from sglang.srt.runtime_context import get_parallel

    return bool(get_parallel().attn_tp_rank == 0)


def _store_of(capturer: Any) -> RowStore | None:
    return getattr(capturer.host_cache, _STORE, None)


def _slots(req_pool_idx: int, seqlen: int, req_to_token_pool: Any, start_len: int = 0) -> Any:
    """The slots that `BaseTopkCapturer.get_topk` reads, by its own parameters, where they are: on the device."""
    begin = min(start_len, seqlen - 1)
    return req_to_token_pool.req_to_token[req_pool_idx][begin : seqlen - 1]
