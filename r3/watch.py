"""What a run does about the alarms of a step's numbers: events, W&B alerts, and the stop that was asked for."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict

import numpy as np

from r3.alarms import AlarmLimits, EarlyLoads, Loads, find_step_alarms
from r3.canary import Alert
from r3.checkpoint import replace_text
from r3.config import Config
from r3.errors import DivergenceError
from r3.metrics import Floats
from r3.run import RunDirectory
from r3.types import ModelSpec, StepResult

log = logging.getLogger("r3")


class Watch:
    """Looks at every step of one run; `done` is the last step that a resumed run has behind it."""

    def __init__(self, config: Config, spec: ModelSpec, run: RunDirectory, alert: Alert, done: int = 0) -> None:
        limits = config.metrics
        self._config, self._spec, self._run, self._alert = limits, spec, run, alert
        self._limits = AlarmLimits(limits.alarm_k3, limits.alarm_load, limits.alarm_dead, limits.alarm_drift)
        self._early = read_early_loads(run, done)

    def measure(self, result: StepResult) -> dict[str, float]:
        """Return `router/load_drift` of one step, once there are early steps to compare with, and remember those."""
        drift, early = self._drift(result), self._early
        self._early = early.with_step(result.step, _loads(result), self._config.early_steps)
        if self._early is not early:
            write_early_loads(self._run, self._early)
        return {} if drift is None else {"router/load_drift": float(drift.max(initial=0.0))}

    def check(self, report: Mapping[str, float], result: StepResult) -> None:
        """Log and alert what one step broke.

        Raises `DivergenceError` for it where `metrics.on_alarm` is `stop`.
        """
        found = find_step_alarms(
            report,
            _loads(result),
            self._drift(result),
            layers=self._spec.moe_layers,
            top_k=self._spec.top_k,
            limits=self._limits,
        )
        for alarm in found:
            self._run.log_event("metrics_alarm", step=result.step, **asdict(alarm))
            log.warning("step %d: %s", result.step, alarm.sentence)
            self._alert(result.step, alarm)
        if found and self._config.on_alarm == "stop":
            text = "; ".join(alarm.sentence for alarm in found)
            raise DivergenceError(f"step {result.step}: {text} (metrics.on_alarm: stop)")

    def _drift(self, result: StepResult) -> Floats | None:
        return self._early.drift(result.step, _loads(result), self._config.early_steps)


def _loads(result: StepResult) -> Loads:
    return np.zeros((0, 0), np.int64) if result.loads is None else result.loads


def write_early_loads(run: RunDirectory, early: EarlyLoads) -> None:
    """Write the early steps' expert loads to `RUN/expert_load.json`, so that a resumed run compares with the same."""
    replace_text(run.expert_load, json.dumps({str(step): loads.tolist() for step, loads in early.by_step.items()}))


def read_early_loads(run: RunDirectory, done: int) -> EarlyLoads:
    """Return what an earlier part of the run wrote, up to step `done`; nothing for a run that begins."""
    if not done or not run.expert_load.exists():
        return EarlyLoads({})
    found = json.loads(run.expert_load.read_text())
    return EarlyLoads({int(step): np.array(loads, np.int64) for step, loads in found.items()}).until(done)
