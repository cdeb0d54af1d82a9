"""The start-up canary and the alarms of the audit: what a run proves before its first step, and what it doubts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict

from r3.audit import Alarm, AuditError, find_alarms
from r3.config import Config
from r3.errors import EngineError, RoutingError
from r3.rollout.pool import RolloutPool
from r3.run import RunDirectory
from r3.tasks import Task
from r3.trainer.group import TrainerGroup
from r3.types import Prompt

log = logging.getLogger("r3")
# Told of every alarm: the step and the alarm.
Alert = Callable[[int, Alarm], None]


def no_alert(step: int, alarm: Alarm) -> None:
    """Tell nobody."""


def prove(
    config: Config,
    task: Task,
    pool: RolloutPool,
    trainers: TrainerGroup,
    run: RunDirectory,
    alert: Alert = no_alert,
) -> None:
    """Compare the two models and, as a canary, replay a few generations before anything is trained.

    Raises `EngineError` when the engine does not capture or computes other log-probs; `RoutingError` when cached rows
    differ from freshly computed ones, rows were not replayed or a layer did not consult replay; `AuditError` when the
    record does not fit the trainer's own choice. No policy softens the canary; `metrics.canary` switches it off.
    """
    spec = pool.spec()
    spec.model.require_same(trainers.spec(), "engine", "trainer")
    if config.routing.capture and not spec.capture:
        raise EngineError(f"{spec.engine} runs without routing capture; start it with enable_return_routed_experts")
    if not (config.metrics.canary and config.routing.capture):
        return
    prompts = canary_prompts(task, config.metrics.canary_prompts)
    found = trainers.audit([pool.canary(prompts)])
    run.log_event("canary", prompts=len(prompts), **found)
    with alarms_logged(run, step=0, alert=alert):
        check_canary(config, found)


def canary_prompts(task: Task, number: int) -> list[Prompt]:
    """Return that many different prompts, held-out ones first; fewer where the task has no more."""
    draws = (task.heldout_prompt, task.train_prompt)
    different: dict[str, Prompt] = {}
    for draw in draws:
        for i in range(4 * number):
            if len(different) == number:
                break
            different.setdefault((prompt := draw(i)).text, prompt)
    return list(different.values())


def check_canary(config: Config, found: Mapping[str, float]) -> None:
    """Raise what the canary found wrong: first what is wrong with the record, then other log-probs."""
    limit = config.metrics.canary_abs_mean
    if found["router/coverage"] != 1:
        raise RoutingError(
            f"the start-up canary failed: router/coverage is {found['router/coverage']:g}, so rows were not replayed"
        )
    if found["router/mismatched_ids"] != 0:
        raise RoutingError(
            f"the start-up canary failed: {found['router/mismatched_ids']:g} recorded ids were not used by the router"
        )
    if alarms := find_alarms(found, config.routing.min_overlap):
        raise AuditError("the start-up canary failed", alarms)
    if not found["mismatch/abs_mean"] <= limit:
        raise EngineError(
            f"the start-up canary failed: mean |log-prob difference| under replay is {found['mismatch/abs_mean']:.3f} "
            f"nats, limit {limit:g} (metrics.canary_abs_mean); engine and trainer do not run the same model"
        )


@contextmanager
def alarms_logged(run: RunDirectory, step: int, alert: Alert = no_alert) -> Iterator[None]:
    """Write the alarms that end a run to `events.jsonl` as well, and send an alert of each."""
    try:
        yield
    except AuditError as error:
        log_alarms(error.alarms, run, step, alert)
        raise


def warn_of(alarms: Sequence[Alarm], run: RunDirectory, step: int, alert: Alert = no_alert) -> None:
    """Log alarms that do not end the run (`routing.on_alarm: warn`)."""
    log_alarms(alarms, run, step, alert)
    for alarm in alarms:
        log.warning("step %d: %s", step, alarm.sentence)


def log_alarms(alarms: Sequence[Alarm], run: RunDirectory, step: int, alert: Alert = no_alert) -> None:
    """Write one event per alarm and send an alert of it; step 0 is the start-up canary."""
    for alarm in alarms:
        run.log_event("routing_alarm", step=step, **asdict(alarm))
        alert(step, alarm)
