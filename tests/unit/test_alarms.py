"""Alarms over a step's numbers: each rule by hand, and what a run does about them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from r3.alarms import AlarmLimits, EarlyLoads, find_step_alarms
from r3.audit import Alarm
from r3.config import Config, load_config
from r3.errors import DivergenceError
from r3.run import RunDirectory, read_rows
from r3.tracking import Tracker
from r3.types import ModelSpec, StepResult
from r3.watch import Watch, read_early_loads

LIMITS = AlarmLimits(k3=0.05, load=3.0, dead=0.5, drift=0.3)
SPEC = ModelSpec("qwen3_moe", 3, (0, 2), 8, 2, 64, 320)
EVEN = np.full((2, 8), 100, np.int64)


def rules(loads: np.ndarray, drift: np.ndarray | None = None, k3: float = 1e-4) -> list[tuple[str, int | None]]:
    found = find_step_alarms({"mismatch/k3": k3}, loads, drift, layers=(0, 2), top_k=2, limits=LIMITS)
    return [(alarm.rule, alarm.layer) for alarm in found]


def with_layer(row: list[int]) -> np.ndarray:
    loads = EVEN.copy()
    loads[1] = row
    return loads


def test_a_healthy_step_is_silent() -> None:
    assert rules(EVEN, np.array([0.1, 0.3])) == []
    assert rules(np.zeros((2, 8), np.int64)) == [], "a step without records has no loads"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([400, 60, 60, 60, 60, 60, 60, 40], [("load", 2)]),  # 4 times the mean
        ([200, 200, 200, 0, 0, 0, 0, 0], [("dead", 2)]),  # 5 of 8 are dead, 2.7 times the mean
        ([300, 300, 0, 0, 0, 0, 0, 0], [("load", 2), ("dead", 2)]),  # every row the same two
        ([2, 2, 2, 0, 0, 0, 0, 0], []),  # too few choices to tell
    ],
)
def test_a_collapsing_layer_is_named(row: list[int], expected: list[tuple[str, int]]) -> None:
    assert rules(with_layer(row)) == expected


def test_a_layer_without_a_choice_is_dead_below_the_share_too() -> None:
    loads = np.array([[50, 50, 50, 50], [100, 100, 0, 0]])
    limits = AlarmLimits(k3=1, load=10, dead=0.6, drift=0.9)
    (alarm,) = find_step_alarms({}, loads, None, layers=(0, 1), top_k=2, limits=limits)
    assert (alarm.rule, alarm.layer, alarm.value) == ("dead", 1, 0.5)
    assert "sends every row to the same experts" in alarm.sentence


@pytest.mark.parametrize("k3", [0.06, float("nan"), float("inf")])
def test_k3_above_its_limit_and_not_a_number(k3: float) -> None:
    assert rules(EVEN, k3=k3) == [("k3", None)]


def test_drift_names_the_worst_layer() -> None:
    assert rules(EVEN, np.array([0.31, 0.5])) == [("drift", 2)]


def test_early_steps_are_the_first_that_had_loads() -> None:
    early = EarlyLoads({})
    for step, loads in ((1, EVEN), (2, np.zeros_like(EVEN)), (3, EVEN), (4, 9 * EVEN)):
        early = early.with_step(step, loads, 2)
    assert list(early.by_step) == [1, 3]
    assert early.drift(3, EVEN, 2) is None, "an early step is not compared with itself"
    assert EarlyLoads({1: EVEN}).drift(2, EVEN, 2) is None, "not before all early steps are there"
    moved = with_layer([200, 200, 200, 200, 0, 0, 0, 0])
    drift = early.drift(4, moved, 2)
    assert drift is not None
    assert drift.tolist() == [0, 0.5]
    assert list(early.until(2).by_step) == [1]


def result(step: int, loads: np.ndarray | None) -> StepResult:
    return StepResult(step, step, {}, (), loads)


def test_a_run_measures_drift_from_its_early_steps_also_when_resumed(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", Config())
    config = load_config(None, ["metrics.early_steps=2"])
    watch = Watch(config, SPEC, run, lambda step, alarm: None)
    moved = with_layer([200, 200, 200, 200, 0, 0, 0, 0])
    assert watch.measure(result(1, EVEN)) == watch.measure(result(2, EVEN)) == {}
    assert watch.measure(result(3, moved)) == {"router/load_drift": 0.5}
    assert watch.measure(result(4, None)) == {}
    resumed = Watch(config, SPEC, run, lambda step, alarm: None, done=2)
    assert resumed.measure(result(3, moved)) == {"router/load_drift": 0.5}
    assert list(read_early_loads(run, 1).by_step) == [1]
    assert read_early_loads(run, 0).by_step == {}


def test_alarms_are_events_and_alerts_and_stop_the_run_when_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, told = RunDirectory.create(tmp_path / "run", Config()), []

    def alert(step: int, alarm: Alarm) -> None:
        told.append((step, alarm.rule))

    with caplog.at_level(logging.WARNING, logger="r3"):
        Watch(Config(), SPEC, run, alert).check({"mismatch/k3": 0.2}, result(7, EVEN))
    (event,) = read_rows(run.path / "events.jsonl")
    assert (event["event"], event["step"], event["rule"], event["value"]) == ("metrics_alarm", 7, "k3", 0.2)
    assert event["threshold"] == 0.01
    assert told == [(7, "k3")]
    assert "step 7: mismatch/k3 is 0.2 nats, limit 0.01" in caplog.text
    stopping = load_config(None, ["metrics.on_alarm=stop"])
    with pytest.raises(DivergenceError, match=r"step 8: mismatch/k3.*metrics\.on_alarm: stop"):
        Watch(stopping, SPEC, run, alert).check({"mismatch/k3": 0.2}, result(8, EVEN))
    assert len(read_rows(run.path / "events.jsonl")) == 2
    Watch(stopping, SPEC, run, alert).check({"mismatch/k3": 0.009}, result(9, EVEN))


class Wandb:
    """Stands where a W&B run would; `broken` makes every call fail."""

    def __init__(self, broken: bool) -> None:
        self.alerts: list[dict[str, object]] = []
        self._broken = broken

    def alert(self, **facts: object) -> None:
        if self._broken:
            raise ConnectionError("no network")
        self.alerts.append(facts)


@pytest.mark.parametrize("broken", [False, True])
def test_an_alarm_is_a_wandb_alert_that_never_ends_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    wandb = Wandb(broken)
    monkeypatch.setattr("r3.tracking.open_wandb", lambda config, path: wandb)
    run = RunDirectory.create(tmp_path / "run", Config())
    tracker = Tracker(Config(), run)
    for _ in range(2):
        tracker.alert(3, Alarm("drift", 0.4, 0.3, "layer 2 drifts", layer=2))
    if broken:
        assert [row["event"] for row in read_rows(run.path / "events.jsonl")] == ["wandb_failed"]
    else:
        sent = {"title": "r3: drift", "text": "step 3: layer 2 drifts", "level": "WARN", "wait_duration": 600}
        assert wandb.alerts == 2 * [sent], "W&B itself leaves out what comes within the pause"
