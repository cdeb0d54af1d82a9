"""What the driver makes of the canary and of alarms: which prompts, which error, which events."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from r3.audit import Alarm, AuditError
from r3.canary import alarms_logged, canary_prompts, check_canary, warn_of
from r3.config import Config, TaskConfig
from r3.errors import EngineError, RoutingError
from r3.run import RunDirectory, read_rows
from r3.tasks import Task, open_task
from r3.types import Prompt

HEALTHY = {
    "router/coverage": 1.0,
    "router/mismatched_ids": 0.0,
    "router/audited_rows": 200.0,
    "router/lag0_overlap": 0.98,
    "router/lag_margin": 0.4,
    "router/overlap_layer/0": 0.99,
    "router/overlap_layer/1": 0.97,
    "router/lag_margin_layer/0": 0.4,
    "router/lag_margin_layer/1": 0.4,
    "router/overlap_window_min": 0.97,
    "router/overlap_window_row": 0.0,
    "mismatch/abs_mean": 0.01,
}
ALARM = Alarm("layer", 0.1, 0.5, "layer 3 is wrong", layer=3)


class Source:
    """A task that knows a few texts only."""

    def __init__(self, texts: int) -> None:
        self.texts = texts

    def train_prompt(self, index: int) -> Prompt:
        return Prompt(index, f"text {index % self.texts}", "")

    def heldout_prompt(self, index: int) -> Prompt:
        return Prompt(index, f"held out {index % 3}", "")


@pytest.mark.parametrize(("texts", "number", "expected"), [(100, 8, 8), (100, 20, 20), (2, 8, 5)])
def test_the_prompts_are_different_as_long_as_there_are_some(texts: int, number: int, expected: int) -> None:
    prompts = canary_prompts(Task(Source(texts), lambda prompt, text: 0.0), number)
    assert len({prompt.text for prompt in prompts}) == len(prompts) == expected
    assert [prompt.text for prompt in prompts[:3]] == [f"held out {i}" for i in range(3)]


def test_the_default_task_has_eight_different_prompts() -> None:
    pytest.importorskip("reasoning_gym")
    assert len(canary_prompts(open_task(TaskConfig()), 8)) == 8


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"router/coverage": 0.9}, RoutingError, r"router/coverage is 0\.9"),
        ({"router/mismatched_ids": 2.0}, RoutingError, "2 recorded ids were not used"),
        ({"router/lag0_overlap": 0.5, "router/lag_margin": -0.4}, AuditError, "fits better shifted by one token"),
        ({"router/overlap_layer/1": 0.2}, AuditError, r"layer 1 overlaps the trainer's own top-k by 0\.200"),
        ({"mismatch/abs_mean": 5.8}, EngineError, r"5\.800 nats.*do not run the same model"),
        ({"mismatch/abs_mean": float("nan")}, EngineError, "nan nats"),
    ],
)
def test_the_first_fault_is_named(change: dict[str, float], error: type[Exception], message: str) -> None:
    check_canary(Config(), HEALTHY)
    with pytest.raises(error, match=f"the start-up canary failed: .*{message}"):
        check_canary(Config(), HEALTHY | change)


def test_alarms_are_events_whether_they_end_the_run_or_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunDirectory.create(tmp_path / "run", Config())
    with pytest.raises(AuditError, match="step 3: layer 3 is wrong"), alarms_logged(run, 3):
        raise AuditError("step 3", (ALARM, ALARM))
    with caplog.at_level(logging.WARNING, "r3"):
        warn_of((ALARM,), run, 4)
    events = read_rows(run.path / "events.jsonl")
    assert [(e["event"], e["step"], e["rule"], e["layer"]) for e in events] == [
        ("routing_alarm", step, "layer", 3) for step in (3, 3, 4)
    ]
    assert "step 4: layer 3 is wrong" in caplog.text


def test_other_errors_pass_without_an_event(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", Config())
    with pytest.raises(RoutingError, match="checksum"), alarms_logged(run, 1):
        raise RoutingError("checksum")
    assert not (run.path / "events.jsonl").exists()
