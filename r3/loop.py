"""GRPO with rollout router replay, as an algorithm.

    for every step:
        generate      G answers per prompt with the engine's weights; record the experts of every token
        advantages    group-normalised rewards
        train         recompute old log-probs and update, both walking through the recorded experts
        push weights  the trainer's new weights become the engine's
        checkpoint    every few steps, everything that a resumed run needs

Everything heavy (tokens, log-probs, routing, weights) moves between actors by reference; the driver holds scalars.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from r3 import metrics
from r3.advantage import advantages
from r3.canary import alarms_logged, prove, warn_of
from r3.checkpoint import Checkpoint, CheckpointStore, RunState
from r3.config import Config
from r3.errors import CheckpointError, DivergenceError
from r3.rollout.outcome import Rollout
from r3.rollout.pool import RolloutPool
from r3.run import RunDirectory
from r3.sync import WeightSync
from r3.tasks import Task
from r3.tracking import Tracker
from r3.trainer.group import TrainerGroup
from r3.transport import Saving
from r3.types import Prompt, StepResult
from r3.watch import Watch


@dataclass(frozen=True, slots=True)
class Actors:
    """The two sides of the bridge, and the way of the weights between them."""

    pool: RolloutPool
    trainers: TrainerGroup
    weights: WeightSync


def train(
    config: Config,
    task: Task,
    actors: Actors,
    run: RunDirectory,
    tracker: Tracker,
    checkpoint: Checkpoint | None = None,
) -> None:
    """Run the method of the module docstring up to step `run.steps`, from the start or from a checkpoint.

    Raises `RoutingError` for a record that cannot be trusted (`AuditError` where the audit found it), `EngineError` for
    a dead engine or rank and `DivergenceError` when the mismatch or the gradient leaves its limits, or for an alarm
    that is to stop the run (`metrics.on_alarm`).
    """
    pool, trainers = actors.pool, actors.trainers
    store = CheckpointStore(run.path, config.run.keep_checkpoints)
    done, skipped = restore(checkpoint, actors) if checkpoint else (0, 0)
    prove(config, task, pool, trainers, run, tracker.alert)
    watch = Watch(config, trainers.spec(), run, tracker.alert, done)
    heldout = [task.heldout_prompt(i) for i in range(config.task.eval_prompts)]
    for step in range(done + 1, config.run.steps + 1):
        clock = Clock()
        report: dict[str, float] = {}
        if evaluates(config, step):
            with clock("eval_s"):
                report["eval/reward_mean"] = float(np.mean(pool.evaluate(heldout)))
        with clock("generate_s"):
            rollout = pool.generate(training_prompts(config, task, step), step)
        credit = advantages(rollout.rewards, rollout.groups, config.grpo.advantage)
        saving = Saving.start(run.routing(step), rollout.batches) if saves_records(config, step) else None
        with alarms_logged(run, step, tracker.alert):
            result = trainers.step(step, credit, measures_native(config, step), rollout.batches)
        warn_of(result.alarms, run, step, tracker.alert)
        if saving is not None:
            saving.wait()
        with clock("weights_s"):
            moved = actors.weights.push()
        report |= (
            moved | rollout_metrics(rollout) | dict(result.metrics) | watch.measure(result) | clock.metrics(result)
        )
        tracker.log(step, report, result.tokens)
        run.write_status("running", step=step)
        skipped = skipped + 1 if result.metrics["train/skipped_steps"] else 0
        watch.check(report, result)
        guard(config, step, report, skipped)
        if saves(config, step):
            state = RunState(
                step=step,
                weight_version=result.weight_version,
                skipped=skipped,
                ranks=config.trainer.processes,
                seed=config.run.seed,
                fingerprint=trainers.spec().fingerprint,
            )
            run.log_event("checkpoint", step=step, path=str(store.save(state, trainers.save_state)))
    if config.run.eval_every:
        final = {"eval/reward_mean": float(np.mean(pool.evaluate(heldout)))}
        run.log_event("final_evaluation", prompts=len(heldout), **final)
    trainers.save_hf(run.hf)


def restore(checkpoint: Checkpoint, actors: Actors) -> tuple[int, int]:
    """Give the ranks their saved state and the engines the ranks' weights; return completed and skipped steps."""
    state = checkpoint.state
    found, model = actors.pool.spec().model.fingerprint, state.fingerprint
    if found != model:
        raise CheckpointError(f"{checkpoint.path} is of model {model}, model.path holds {found}")
    version = actors.trainers.load_state(checkpoint.path)
    if version != state.weight_version:
        raise CheckpointError(f"{checkpoint.path}: the ranks hold weights {version}, not {state.weight_version}")
    actors.weights.push()
    return state.step, state.skipped


def saves(config: Config, step: int) -> bool:
    """Tell whether this step (1-based) ends with a checkpoint: every `run.checkpoint_every`, and the last."""
    every = config.run.checkpoint_every
    return every > 0 and (step % every == 0 or step == config.run.steps)


def saves_records(config: Config, step: int) -> bool:
    """Tell whether the routing records of this step (1-based) are saved: every `routing.save_every`."""
    every = config.routing.save_every if config.routing.capture else 0
    return every > 0 and step % every == 0


def training_prompts(config: Config, task: Task, step: int) -> list[Prompt]:
    """Return the prompts of a step (1-based): a fresh block of the training prompts, offset by the run's seed."""
    size = config.rollout.prompts_per_step
    first = (config.run.seed * 1_000_003 + step - 1) * size
    return [task.train_prompt(i) for i in range(first, first + size)]


def evaluates(config: Config, step: int) -> bool:
    """Tell whether held-out prompts are answered before this step (1-based): the first, then every `run.eval_every`."""
    return config.run.eval_every > 0 and (step - 1) % config.run.eval_every == 0


def measures_native(config: Config, step: int) -> bool:
    """Tell whether this step (1-based) also runs the pass without replay."""
    every = config.metrics.counterfactual_every
    return every > 0 and (step - 1) % every == 0


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Return `rollout/*`, `transport/*` and the sample counts of one step, from the driver's small facts.

    - `rollout/reward_mean`, `reward_std` (population): over the samples. `response_tokens_mean`: tokens a sample, the
      stop token included. `truncated_frac`: share of samples that met `rollout.max_new_tokens`, in [0, 1].
    - `rollout/tokens_per_s`: response tokens / seconds of the slowest worker.
    - `router/dropped_samples`, `native_samples`, `stale_rows`: counts; 0 in a healthy run.
    - `transport/routing_bytes`: of all records, prompt rows that a group shares once; `bytes_per_token`: the same a
      recorded row, at most layers x top-k x 1 or 2; `transport/put_s`, `time/checks_s`: seconds of the slowest worker.
    """
    responses = np.array([fact.response_tokens for fact in rollout.facts])
    return {
        "rollout/reward_mean": float(rollout.rewards.mean()),
        "rollout/reward_std": float(rollout.rewards.std()),
        "rollout/response_tokens_mean": float(responses.mean()),
        "rollout/truncated_frac": float(np.mean([fact.finish == "length" for fact in rollout.facts])),
        "rollout/tokens_per_s": float(responses.sum() / rollout.seconds),
        "router/dropped_samples": float(rollout.dropped),
        "router/stale_rows": float(rollout.stale_rows),
        "router/native_samples": float(len(rollout.native_samples)),
        "transport/routing_bytes": float(rollout.routing_bytes),
        "transport/bytes_per_token": rollout.routing_bytes / max(rollout.routing_rows, 1),
        "transport/put_s": rollout.pack_seconds,
        "time/checks_s": rollout.check_seconds,
    }


def guard(config: Config, step: int, report: Mapping[str, float], skipped: int) -> None:
    """Raise `DivergenceError` when the mismatch passes its limit or too many steps in a row had no finite gradient."""
    k3 = report.get("mismatch/k3", 0.0)
    if not k3 <= config.metrics.max_k3 or not math.isfinite(k3):
        raise DivergenceError(
            f"step {step}: mismatch/k3 is {k3:.3g}, limit {config.metrics.max_k3:g} (metrics.max_k3); "
            "trainer and engine no longer compute the same distribution"
        )
    if skipped > config.metrics.max_skipped_steps:
        raise DivergenceError(f"step {step}: {skipped} steps in a row had a non-finite gradient and were skipped")


class Clock:
    """Wall times of the phases of one step."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._phases[phase] = time.perf_counter() - begin

    def metrics(self, result: StepResult) -> dict[str, float]:
        """Return `time/*`; `idle_frac` is the share of the step in which the trainer waited.

        Evaluation and counterfactual passes are measurements: their time is no part of the step's.
        """
        measured = self._phases.pop("eval_s", 0.0) + result.metrics.get("time/counterfactual_s", 0.0)
        step_s = time.perf_counter() - self._start - measured
        busy = sum(result.metrics.get(f"time/{part}", 0.0) for part in ("train_s", "install_s"))
        return {
            **metrics.prefixed("time", self._phases),
            "time/step_s": step_s,
            "time/idle_frac": max(0.0, 1 - busy / step_s),
        }
