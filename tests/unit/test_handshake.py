"""The handshake: what an engine lacks is an error of exit code 4 that names the option to set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from r3.errors import EngineError, RoutingError
from r3.rollout.engine import EngineSpec, Generation, Recorded, Request, Sampling
from r3.rollout.handshake import probe, require
from r3.rollout.wire import Wire
from r3.routing import RoutingTrace
from r3.types import ModelSpec

MODEL = ModelSpec("qwen3_moe", 6, (1, 2, 4, 5), 16, 4, 64, 100)
RECORDED = Recorded(MODEL.moe_layers, 16, 4, wire_dtype="int32", honours_start=True, cached_rows=True)
SPEC = EngineSpec(MODEL, "sglang 0.5.23", True, "bfloat16", RECORDED)

LACKING: dict[str, tuple[EngineSpec, str]] = {
    "capture": (replace(SPEC, capture=False), "sglang 0.5.23 runs without routing capture; start it with --enable-ret"),
    "vllm": (replace(SPEC, capture=False, engine="vllm 0.33.0"), "start it with --enable-return-routed-experts"),
    "lightllm": (replace(SPEC, capture=False, engine="lightllm"), "start it with --enable_return_routed_experts"),
    "a layer": (
        replace(SPEC, recorded=replace(RECORDED, layers=(1, 2))),
        r"records layers \(1, 2\), the model has routers in \(1, 2, 4, 5\); serve the whole model",
    ),
    "experts": (replace(SPEC, recorded=replace(RECORDED, num_experts=18)), "top-4 of 18 experts, the model has top-4"),
    "top-k": (replace(SPEC, recorded=replace(RECORDED, top_k=5)), "records top-5 of 16"),
    "logical ids": (replace(SPEC, recorded=replace(RECORDED, ids="physical")), "physical expert ids; switch .*EPLB"),
    "cached rows": (replace(SPEC, recorded=replace(RECORDED, cached_rows=False)), "--disable-radix-cache"),
}


@pytest.mark.parametrize(("spec", "message"), LACKING.values(), ids=LACKING)
def test_what_an_engine_lacks_is_named(spec: EngineSpec, message: str) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        require(spec, capture=True)
    assert caught.value.exit_code == 4
    require(spec, capture=False)


def test_an_engine_that_has_everything_or_does_not_say_passes() -> None:
    require(SPEC, capture=True)
    require(replace(SPEC, recorded=None), capture=True)


class Answers:
    """Answers the probe as an engine with the given habits would."""

    def __init__(self, **habits: Any) -> None:
        self.habits = habits
        self.asked: list[int] = []

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        (request,) = requests
        self.asked.append(request.routing_start)
        tokens = np.append(request.tokens, [7, 8]).astype(np.int32)
        rows = len(tokens) - 1
        seed = len(self.asked) if self.habits.get("restless") else 0
        chosen = np.random.default_rng(seed).random((rows, 4, 16)).argsort(axis=2)[:, :, :4]
        start = request.routing_start
        record = RoutingTrace.record(
            chosen[start:], tokens, layers=MODEL.moe_layers, num_experts=16, weight_version=0, engine="e", begin=start
        )
        return [
            Generation(
                tokens,
                len(request.tokens),
                np.zeros(2, np.float32),
                None if "defect" in self.habits else record,
                "length",
                0,
                cached_tokens=self.habits.get("cached", 20) if len(self.asked) > 1 else 0,
                defect=self.habits.get("defect"),
                wire=Wire("uint8", start if self.habits.get("honours", True) else 0),
            )
        ]


@pytest.mark.parametrize(("honours", "cached"), [(True, 20), (False, 0)])
def test_a_probe_finds_what_the_records_hold(honours: bool, cached: int) -> None:
    answers = Answers(honours=honours, cached=cached)
    found = probe(answers, MODEL, "sglang 0.5.23")
    assert answers.asked == [0, 0, 23]
    assert found == Recorded(
        MODEL.moe_layers, 16, 4, wire_dtype="uint8", honours_start=honours, cached_rows=True if cached else None
    )


def test_a_cache_that_returns_other_rows_is_found() -> None:
    with pytest.raises(EngineError, match=r"returns other experts for a prompt that it has cached.*HiCache"):
        probe(Answers(restless=True), MODEL, "sglang 0.5.23")


def test_a_probe_without_a_usable_record_names_the_option() -> None:
    with pytest.raises(EngineError, match=r"24 rows too few.*--enable-return-routed-experts"):
        probe(Answers(defect=RoutingError("24 rows too few")), MODEL, "sglang 0.5.23")
