"""SGLang's scheduler as the plugin's hooks see it: passes, results that arrive late, requests. No SGLang here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from r3.rollout.provenance import KEY, Weights, unpack
from r3.rollout.sglang_plugin.hooks import Hooks
from r3.rollout.sglang_plugin.ledger import Ledger

NEUTRAL = {"weight_version": "4", "disaggregation_mode": "null", "pp_size": 1, "speculative_algorithm": None}


class Slots:
    """A tensor, as far as the hooks look at one."""

    def __init__(self, *values: int) -> None:
        self.values = np.array(values, dtype=np.int64)

    def cpu(self) -> Slots:
        return self

    def numpy(self) -> np.ndarray:
        return self.values

    def __getitem__(self, where: slice) -> Slots:
        return Slots(*self.values[where].tolist())


class Pending:
    def __init__(self, slots: Slots) -> None:
        self.out_cache_loc = slots
        self.host_cache = SimpleNamespace(num_tokens=32)


class Scheduler:
    """One request, passes over its slots, with or without overlap."""

    def __init__(self, overlap: bool, **arguments: Any) -> None:
        self.ledger = Ledger()
        self.hooks = Hooks(self.ledger)
        self.server_args = SimpleNamespace(**(NEUTRAL | arguments))
        self.capturer = SimpleNamespace(host_cache=SimpleNamespace(num_tokens=32))
        self.overlap = overlap

    def launch(self, *slots: int, passes: int = 1) -> Any:
        """A scheduler step; returns the batch's result."""

        def forward(scheduler: Any) -> Any:
            pending = None
            for _ in range(passes):
                batch = SimpleNamespace(out_cache_loc=Slots(*slots))
                pending = self.hooks.on_forward_end(
                    lambda capturer, batch, *a, **k: Pending(batch.out_cache_loc) if self.overlap else None,
                    self.capturer, forward_batch=batch,
                )  # fmt: skip
            return SimpleNamespace(pending=pending)

        return self.hooks.run_batch(forward, self)

    def process(self, result: Any, *requests: Any, finish: Any = None) -> None:
        """The result of a step arrives: rows are written, tokens are committed, a request may finish."""

        def original(processor: Any, batch: Any, result: Any) -> None:
            if result.pending is not None:
                self.hooks.finalize(lambda pending: None, result.pending)
            for request in batch.reqs:
                request.output_ids.append(9)
            if finish is not None:
                self.collect(finish)

        self.hooks.process_result(original, None, SimpleNamespace(reqs=list(requests)), result)

    def collect(self, request: Any) -> None:
        def original(processor: Any, request: Any) -> None:
            pool = SimpleNamespace(req_to_token={0: Slots(*request.slots)})
            length = request.prompt + len(request.output_ids)
            self.hooks.get_topk(
                lambda *a, **k: "rows", self.capturer, req_pool_idx=0, seqlen=length, req_to_token_pool=pool
            )
            request.routed_experts = "rows"

        self.hooks.collect(original, None, request)


class Answer(SimpleNamespace):
    """A request of SGLang."""

    @property
    def output_ids_through_stop(self) -> list[int]:
        return self.output_ids


def answer(prompt: int, *slots: int) -> Answer:
    return Answer(
        prompt=prompt, slots=slots, output_ids=[], customized_info=None, routed_experts=None, return_routed_experts=True
    )


def stamps(one: Answer) -> tuple[list[int], list[int], tuple[Weights, ...]]:
    values = one.customized_info[KEY]
    assert len(values) == len(one.output_ids)
    found = unpack({KEY: values}, one.prompt + len(one.output_ids) - 1, len(one.output_ids))
    assert found is not None
    return found.rows.tolist(), found.tokens.tolist(), found.weights
