"""The keys that the driver makes itself, from small facts and its clock; no actor is started."""

from __future__ import annotations

import numpy as np
import pytest

from r3 import loop
from r3.loop import Clock, rollout_metrics
from r3.rollout.outcome import Rollout
from r3.rollout.reports import Dropped, Native
from r3.types import SampleFacts, StepResult

pytestmark = pytest.mark.ray


def test_rollout_keys_by_hand() -> None:
    facts = (
        SampleFacts(0, 0, 1.0, "stop", 10, 4, 0),
        SampleFacts(0, 1, 0.0, "length", 10, 12, 0),
        SampleFacts(1, 0, 0.0, "stop", 9, 5, 0),
    )
    rollout = Rollout(
        batches=(), facts=facts, dropped_samples=(Dropped(1, 1, "aborted"),), native_samples=(Native(1, 0, "none"),),
        seconds=3.5, check_seconds=0.2, score_seconds=0.1, pack_seconds=0.4, prompt_tokens=39, response_tokens=21,
        cached_tokens=0, routing_bytes=640, routing_rows=40, stale_rows=2,
    )  # fmt: skip
    assert rollout_metrics(rollout) == pytest.approx(
        {
            "rollout/reward_mean": 1 / 3,
            "rollout/reward_std": np.sqrt(2) / 3,
            "rollout/response_tokens_mean": 7,
            "rollout/truncated_frac": 1 / 3,
            "rollout/tokens_per_s": 6,
            "router/dropped_samples": 1,
            "router/native_samples": 1,
            "router/stale_rows": 2,
            "transport/routing_bytes": 640,
            "transport/bytes_per_token": 16,
            "transport/put_s": 0.4,
            "time/checks_s": 0.2,
        }
    )


def test_measurements_are_no_part_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    # Begin; evaluation takes 5 s, generation 2 s, weights 1 s; the step ends 20 s after its begin.
    ticks = iter([0.0, 1.0, 6.0, 6.0, 8.0, 17.0, 18.0, 20.0])
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(ticks))
    clock = Clock()
    for phase in ("eval_s", "generate_s", "weights_s"):
        with clock(phase):
            pass
    spent = {"time/train_s": 5.0, "time/install_s": 1.0, "time/counterfactual_s": 3.0}
    found = clock.metrics(StepResult(1, 1, spent))
    # 20 - 5 of evaluation - 3 of counterfactual passes; the trainer worked 6 of these 12 seconds.
    assert found == {"time/generate_s": 2, "time/weights_s": 1, "time/step_s": 12, "time/idle_frac": 0.5}
