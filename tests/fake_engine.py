"""A deterministic engine without a model, for tests of rollout worker and pool; faults are switched on by config."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from r3.config import Config
from r3.errors import EngineError, RoutingError
from r3.rollout.engine import EngineSpec, Generation, Request, Sampling
from r3.rollout.wire import Wire
from r3.routing import RoutingTrace
from r3.types import ModelSpec, Prompt, WeightVersion
from r3.weights import WeightSource


class FakeEngine:
    """Answers with tokens, log-probs and experts that are functions of prompt, member, weight version and position.

    Faults, in `rollout.engine_args`: `die_in` (a method name) with `die_once` (a file that is made by the first death,
    so that only one worker dies once) or with `die_index` (that worker dies every time); `hang_in` (with
    `hang_index`, that worker alone); `changed_by` (a file: where it is, the engine says other things of itself);
    `refuse_start`;
    `bad_every` (every n-th record is malformed); `missing_every` (no record came back); `abort_every`;
    `constant_layer`; `stale_cache`; `stale_mix` (only in batches that mix
    cached and new prompts); `unshared_every` (it has shared memory, into which every n-th record did not fit);
    `capture_off` (the engine runs without capture, whatever the config says).
    """

    def __init__(self, config: Config, model_dir: str | Path, index: int) -> None:
        self._faults: dict[str, Any] = dict(config.rollout.engine_args)
        self._model = ModelSpec.from_directory(model_dir)
        self._capture = config.routing.capture
        self._index = index
        self._version = 0
        self._calls = 0
        if "refuse_start" in self._faults:
            raise EngineError(str(self._faults["refuse_start"]))
        self._fault("start")

    def spec(self) -> EngineSpec:
        captures, shares = self._capture and "capture_off" not in self._faults, "unshared_every" in self._faults
        spec = EngineSpec(self._model, "fake 1", captures, "float32", unstamped="made up", shared_memory=shares)
        changed = "changed_by" in self._faults and Path(self._faults["changed_by"]).exists()
        return replace(spec, unstamped="changed", unverified="changed") if changed else spec

    def generate(self, requests: Sequence[Request], sampling: Sampling, *, capture: bool) -> list[Generation]:
        self._fault("evaluate" if sampling.greedy and not capture else "generate")
        self._calls += 1
        return [self._answer(number, request, sampling, capture) for number, request in enumerate(requests)]

    def load_weights(self, source: WeightSource, version: WeightVersion) -> None:
        self._fault("load_weights")
        self._version = version

    def flush_cache(self) -> None:
        self._calls = 0

    def close(self) -> None:
        pass

    def _answer(self, number: int, request: Request, sampling: Sampling, capture: bool) -> Generation:
        member = 0 if sampling.greedy else number
        length = 2 + member % max(1, sampling.max_new_tokens - 1)
        response = 2 + (np.arange(length) + member + self._version) % 90
        tokens = np.concatenate([request.tokens, response]).astype(np.int32)
        answer = Generation(
            tokens=tokens,
            prompt_len=len(request.tokens),
            logprobs=np.linspace(-2, -1, length, dtype=np.float32),
            routing=self._record(tokens) if capture else None,
            finish="length",
            weight_version=self._version,
            cached_tokens=len(request.tokens) - 1 if self._calls > 1 else 0,
        )
        if "unshared_every" in self._faults:
            answer = replace(answer, wire=Wire("uint8", 0, not self._is_every("unshared_every", number)))
        if capture and self._is_every("missing_every", number):
            return replace(answer, routing=None)
        if capture and self._is_every("bad_every", number):
            return replace(answer, routing=None, defect=RoutingError(f"request {number}: made-up defect"))
        if self._is_every("abort_every", number):
            return replace(answer, tokens=request.tokens, logprobs=answer.logprobs[:0], routing=None, finish="abort")
        return answer

    def _record(self, tokens: np.ndarray[Any, Any]) -> RoutingTrace:
        model = self._model
        shift = self._calls if "stale_cache" in self._faults else 0
        shift += int("stale_mix" in self._faults and self._calls == 2)
        first = np.asarray(tokens[:-1], dtype=np.int64)[:, None] + np.arange(len(model.moe_layers)) + shift
        if "constant_layer" in self._faults:
            first[:, self._faults["constant_layer"]] = 0
        wide = (first[:, :, None] + np.arange(model.top_k)) % model.num_experts
        return RoutingTrace.record(
            wide,
            tokens,
            layers=model.moe_layers,
            num_experts=model.num_experts,
            weight_version=self._version,
            engine="fake 1",
        )

    def _is_every(self, fault: str, number: int) -> bool:
        return fault in self._faults and number % self._faults[fault] == 0

    def _fault(self, method: str) -> None:
        if self._faults.get("hang_in") == method and self._faults.get("hang_index", self._index) == self._index:
            time.sleep(3600)
        if self._faults.get("die_in") != method:
            return
        if "die_once" in self._faults:
            try:
                Path(self._faults["die_once"]).touch(exist_ok=False)
            except FileExistsError:
                return
            os._exit(1)
        if self._faults.get("die_index") == self._index:
            os._exit(1)


def make_prompt(index: int) -> dict[str, str]:
    """Prompt source of `task.prompts`."""
    return {"prompt": f"prompt number {index}", "answer": str(index)}


def length_reward(prompt: Prompt, response: str) -> float:
    """`task.reward`: the prompt's index and the length of the response, so that a mix-up of samples shows."""
    return prompt.index * 1000 + len(response)
