"""Is replay exact on this cluster? `python -m r3.doctor replay --config FILE [--layout tp2,pp2 ...] [--json]`.

A model of the config's architecture, small in width and depth, is trained for one step with random forced routing, by
real trainer ranks in every layout asked for, and by one process that nothing is divided over. What both must agree on
is compared: the experts used, the loss, every gradient, the weights behind the update. People run it before a long job.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from r3._identity import require_own_packages
from r3.config import Config, TrainerConfig, load_config
from r3.errors import ConfigError, R3Error, RoutingError
from r3.layout import describe_layout, parse_layout
from r3.shrunk import shrunk_config, trial_advantages, trial_batch, write_model
from r3.trainer.outcome import Rehearsal, worst_difference
from r3.types import ModelSpec

State = Literal["ok", "FAIL"]
_TRAJECTORIES_PER_MICROBATCH = 3


@dataclass(frozen=True, slots=True)
class Limits:
    """What two layouts may differ by, since they add the same numbers in another order.

    `loss`, `logprob`: nats; `gradient`: of the worst tensor, relative to its largest element; `weight`: absolute, for
    at most one weight in a thousand (AdamW turns a gradient that is all rounding error into a step of either sign).
    `same_choice`: whether routers must choose the same experts on their own; in bf16, near ties fall either way.
    """

    loss: float
    logprob: float
    gradient: float
    weight: float
    same_choice: bool


LIMITS: Mapping[str, Limits] = {
    "float32": Limits(loss=1e-6, logprob=1e-5, gradient=1e-5, weight=2e-5, same_choice=True),
    "bfloat16": Limits(loss=1e-2, logprob=0.3, gradient=0.15, weight=3e-3, same_choice=False),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison of a layout with the single process."""

    name: str
    state: State
    detail: str


@dataclass(frozen=True, slots=True)
class Proof:
    """What a layout was found to do."""

    layout: str
    processes: int
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.state == "ok" for check in self.checks)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the proof and return 0 when it holds, 3 when replay is not exact, 2 for a config that cannot work."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.ERROR)
    try:
        require_own_packages()
        config = load_config(options.config, options.overrides)
        found = []
        for proof in prove(config, options.layout or [None], options.scratch):
            found.append(proof)
            if not options.json:
                print(*_lines(proof), sep="\n", flush=True)
    except R3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    failed = [proof.layout for proof in found if not proof.ok]
    if options.json:
        print(json.dumps({"ok": not failed, "layouts": [asdict(proof) for proof in found]}, indent=1))
    else:
        print(f"replay is NOT exact in: {', '.join(failed)}" if failed else "replay is exact")
    return RoutingError.exit_code if failed else 0


def prove(config: Config, layouts: Sequence[str | None], scratch: Path | None) -> Iterator[Proof]:
    """Yield the proof of each layout (None: the config's own) as it is done.

    Raises `ConfigError` for a layout that cannot be and `EngineError` for ranks that do not start.
    """
    trainers = [parse_layout(config.trainer, text) for text in layouts]
    with _folder(scratch) as folder:
        model = folder / "model"
        write_model(shrunk_config(_source(config), trainers), model)
        spec = ModelSpec.from_directory(model)
        # Against Megatron-core's own layers, whatever the layout takes in their place.
        plain = config.trainer.model_copy(update={"transformer_engine": False})
        alone = _trial(config, parse_layout(plain, "dp1,padded,none"))
        with _cluster(alone, trainers) as place:
            expected, _ = _rehearse(alone, model, place, spec)
            for trainer in trainers:
                found, copies = _rehearse(_trial(config, trainer), model, place, spec)
                checks = compare(found, expected, LIMITS[config.trainer.dtype], copies)
                yield Proof(describe_layout(trainer), trainer.processes, checks)


def compare(found: Rehearsal, expected: Rehearsal, limits: Limits, copies: float) -> tuple[Check, ...]:
    """Compare a layout's step with the single process's; both from the same model and records.

    `copies`: of a block of records on one node, at most.
    """
    counts, reference = found.counts, expected.counts
    replayed = counts.replayed == counts.required == reference.required and counts.missing == 0
    same = np.array_equal(counts.disagree, reference.disagree) and counts.disagree_any == reference.disagree_any
    loss = abs(found.loss - expected.loss)
    logprob = float(np.abs(found.logprobs - expected.logprobs).max())
    norm = abs(found.grad_norm / expected.grad_norm - 1)
    off = np.concatenate([
        np.abs(found.weights[name] - value).reshape(-1) > limits.weight for name, value in expected.weights.items()
    ])  # fmt: skip
    checks = [
        _check("ids replayed", replayed and counts.mismatched_ids == 0,
               f"{counts.replayed} of {reference.required} rows, {counts.mismatched_ids} ids unused"),
        _check("own choice", same or not limits.same_choice,
               f"{counts.disagree_any} rows route otherwise without replay, {reference.disagree_any} in one process"),
        _check("loss", loss <= limits.loss, f"differs by {loss:.1e} nats (limit {limits.loss:.0e})"),
        _check("log-probs", logprob <= limits.logprob, f"differ by {logprob:.1e} nats (limit {limits.logprob:.0e})"),
        _check("gradient norm", norm <= limits.gradient, f"differs by {norm:.1e} (limit {limits.gradient:.0e})"),
        _check("weights", off.mean() <= 1e-3,
               f"{off.mean():.1e} of them off by more than {limits.weight:.0e} behind the update (limit 1e-03)"),
        _check("memory", copies == 1, f"{copies:g} copies of the records on a node"),
        # Reaching this line is the check: the rehearsal raises when a microbatch is left active.
        _check("state", True, "empty after the log-prob pass and after the step"),
    ]  # fmt: skip
    if not found.sharded:
        worst, name = worst_difference(found.gradients, expected.gradients)
        checks.insert(4, _check("gradients", worst <= limits.gradient,
                                f"worst {worst:.1e} (limit {limits.gradient:.0e}), {name}"))  # fmt: skip
    return tuple(checks)


def _check(name: str, holds: bool, detail: str) -> Check:
    return Check(name, "ok" if holds else "FAIL", detail)


def _lines(proof: Proof) -> Iterator[str]:
    yield f"{proof.layout} ({proof.processes} processes)"
    for check in proof.checks:
        yield f"  {check.state:<4}  {check.name:<13}  {check.detail}"


def _trial(config: Config, trainer: TrainerConfig) -> Config:
    """Return the config of one rehearsal: the layout, small microbatches so that several are in flight."""
    small = trainer.model_copy(
        update={"micro_batch_size": _TRAJECTORIES_PER_MICROBATCH, "lr": 1e-3, "lr_warmup_steps": 0}
    )
    grpo = config.grpo.model_copy(update={"mini_steps": 1, "kl_coef": 0.0})
    rollout = config.rollout.model_copy(update={"workers": 1, "gpus_per_worker": 0})
    return config.model_copy(update={"trainer": small, "grpo": grpo, "rollout": rollout})


@contextmanager
def _cluster(alone: Config, trainers: Sequence[TrainerConfig]) -> Iterator[Any]:
    """Yield room for the largest layout."""
    from r3.cluster import ray_cluster

    most = max(trainers, key=lambda trainer: trainer.processes)
    with ray_cluster(alone.model_copy(update={"trainer": most})) as places:
        yield places.trainer


def _rehearse(config: Config, model: Path, place: Any, spec: ModelSpec) -> tuple[Rehearsal, float]:
    """Return what a layout's ranks made of the trial, and the copies of its records on a node."""
    from r3.trainer.group import TrainerGroup
    from r3.transport import BatchRef

    batch = BatchRef.put(trial_batch(spec, config.block_layers))
    with TrainerGroup(config, model, place=place) as group:
        found, transport = group.rehearse(trial_advantages(), [batch])
    return found, transport["transport/node_copies"]


def _source(config: Config) -> Mapping[str, Any]:
    """Return the contents of the `config.json` whose architecture is proven."""
    from r3.builtin import PREFIX, is_built, plan_model, resolve_model

    name, reward, seed = config.model.path, config.model.warm_start_reward, config.run.seed
    if name.startswith(PREFIX) and not is_built(plan_model(name, target_reward=reward, seed=seed)[1]):
        reward = 0  # only the shapes are read, and random weights are made in seconds
    path = Path(resolve_model(name, target_reward=reward, seed=seed)) / "config.json"
    # Says what is wrong with a file that cannot be read.
    ModelSpec.from_directory(path.parent).require_routers(name)
    contents: Mapping[str, Any] = json.loads(path.read_text())
    return contents


@contextmanager
def _folder(scratch: Path | None) -> Iterator[Path]:
    """Yield an empty folder for the small model; it is deleted afterwards."""
    if scratch is not None and not scratch.is_dir():
        raise ConfigError(f"--scratch {scratch} is no directory; name one that every node of the cluster sees")
    with tempfile.TemporaryDirectory(prefix="r3-replay-", dir=scratch) as folder:
        yield Path(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="r3.doctor replay",
        usage="python -m r3.doctor replay [--config FILE] [key.path=value ...] [--layout LAYOUT ...] [--json]",
        description="Prove on this cluster that replay is exact in the trainer's layout, on a small model of the "
        "config's architecture and dtype, against a single process.",
        epilog="LAYOUT is a comma list of dpN tpN ppN vppN cpN epN etpN, distopt, alltoall or allgather, packed or "
        "padded, and none, full or selective (recompute); what it leaves out is as in the config, sizes are 1. "
        "exit codes: 0 replay is exact, 2 usage or config, 3 replay is not exact, 4 the ranks did not start",
    )
    parser.add_argument("--config", type=Path, default=None, metavar="FILE", help="as for r3.train")
    parser.add_argument(
        "--layout", action="append", metavar="LAYOUT", help="such as tp2,pp2; may be repeated (default: the config's)"
    )
    parser.add_argument(
        "--scratch", type=Path, metavar="DIR", help="where the small model lies; on several nodes, a shared folder"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="change single keys")
    return parser
