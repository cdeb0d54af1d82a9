"""What the layout tests and `scripts/bench/layouts.py` run in every rank, and the layouts that they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from r3.config import Config
from r3.trainer import batching, replay
from r3.trainer.batching import MicroBatch, StepBatch, microbatch, plan_step
from r3.trainer.model import Architecture
from r3.trainer.outcome import Rehearsal
from r3.trainer.policy import Policy, RoutingUse
from r3.trainer.rehearsal import rehearse
from r3.trainer.worker import TrainerWorker
from r3.types import Batch
from tests.gloo_pool import arranged
from tests.megatron.toys import make_advantages, make_config

TP = {"tensor_parallel": 2}
PP = {"pipeline_parallel": 2}
VPP = {"pipeline_parallel": 2, "virtual_pipeline": 2}
CP = {"context_parallel": 2}
EP = {"expert_parallel": 2}
ETP1 = {"expert_tensor_parallel": 1}
ALLGATHER = {"dispatcher": "allgather"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "dp2 distributed optimizer": {"distributed_optimizer": True},
    "tp2": TP,
    "tp2 allgather": TP | ALLGATHER,
    "tp2+ep2": TP | EP | ETP1,
    "ep2": EP,
    "ep2 allgather": EP | ALLGATHER,
    "pp2": PP,
    "pp2 allgather": PP | ALLGATHER,
    "pp2+vpp2": VPP,
    "cp2": CP,
    "cp2+ep2": CP | EP,
}
LARGE_LAYOUTS: dict[str, dict[str, Any]] = {
    "pp2+ep2": PP | EP,
    "pp2+ep2 allgather": PP | EP | ALLGATHER,
    "tp2+pp2": TP | PP,
    "tp2+cp2": TP | CP,
    "pp2+cp2": PP | CP,
    "dp2+tp2 distributed optimizer": TP | {"distributed_optimizer": True},
    "tp2+ep4": TP | {"expert_parallel": 4} | ETP1,
    "pp2+vpp2+tp2": VPP | TP,
}


def layout_config(changes: dict[str, Any], world: int, **sections: dict[str, Any]) -> Config:
    """Return a config with the layout `changes` over `world` ranks."""
    trainer = {"processes": world, "micro_batch_size": 3} | sections.pop("trainer", {}) | changes
    return make_config(trainer=trainer, **sections)


def run_layout(config: Config, directory: Path, batch: Batch, force: bool = True) -> Rehearsal:
    """Run log-probs and one update in the config's layout; collective over the ranks of the pool."""
    with arranged(config.trainer):
        policy = Policy(config, Architecture.from_directory(directory), directory, updates=10)
        return rehearse(policy, *laid_out(policy, config, batch), RoutingUse(force=force))


def laid_out(policy: Policy, config: Config, batch: Batch) -> tuple[StepBatch, list[MicroBatch]]:
    """Return the step and this rank's microbatches of its only mini-step, in the policy's form."""
    spec = policy.arch.spec
    step = StepBatch.join([batch], make_advantages(batch), spec)
    plan, form = plan_step(step, config.trainer, 1, policy.form, policy.data)
    return step, [microbatch(step, samples, spec, form) for samples in plan[0]]


def worker_in(config: Config, directory: Path) -> TrainerWorker:
    """Return a worker on ranks that have joined already; its own `join` would do that."""
    worker = TrainerWorker(config, str(directory), dist.get_rank(), dist.get_world_size(), 10)
    worker.policy = Policy(config, Architecture.from_directory(directory), directory, updates=10)
    return worker


def step_of_layout(config: Config, directory: Path, batch: Batch) -> dict[str, float] | None:
    """Return the metrics of one training step in the config's layout on rank 0, times aside."""
    with arranged(config.trainer):
        result = worker_in(config, directory).step(1, make_advantages(batch), True, batch)
    if result is None:
        return None
    return {key: value for key, value in result.metrics.items() if not key.endswith(("_s", "tokens_per_s"))}


def resumed(config: Config, directory: Path, batch: Batch, place: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what this rank holds after two steps, uninterrupted and resumed behind the first."""
    with arranged(config.trainer):
        worker = worker_in(config, directory)
        worker.step(1, make_advantages(batch), False, batch)
        worker.save_state(str(place))
        worker.step(2, make_advantages(batch, seed=1), False, batch)
        whole = held(worker.policy)
        worker = worker_in(config, directory)
        worker.load_state(str(place))
        worker.step(2, make_advantages(batch, seed=1), False, batch)
        return whole, held(worker.policy)


def held(policy: Policy) -> dict[str, NDArray[np.float32]]:
    """Return a copy of every parameter and moment of this rank, by a name."""
    found = {name: p for chunk in policy.chunks for name, p in chunk.named_parameters()}
    parts = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    for index, part in enumerate(parts):
        for number, state in enumerate(part.optimizer.state.values()):
            found |= {f"{index}.{number}.{key}": value for key, value in state.items() if torch.is_tensor(value)}
    return {name: tensor.detach().float().numpy().copy() for name, tensor in found.items()}


def run_mutated(config: Config, directory: Path, batch: Batch, mutation: str) -> Rehearsal:
    """`run_layout` with one thing made wrong."""
    with arranged(config.trainer), pytest.MonkeyPatch.context() as patch:
        MUTATIONS[mutation](patch)
        policy = Policy(config, Architecture.from_directory(directory), directory, updates=10)
        return rehearse(policy, *laid_out(policy, config, batch), RoutingUse(force=True))


def _forget_recompute(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(replay.ReplayContext, "_enter_backward", lambda *_: None)


def _swap_two_layers(patch: pytest.MonkeyPatch) -> None:
    ids = replay._Active.ids
    patch.setattr(replay._Active, "ids", lambda active, column: ids(active, column ^ 1 if column < 2 else column))


def _drop_the_zigzag(patch: pytest.MonkeyPatch) -> None:
    """The record is cut into contiguous halves, the tokens are not."""
    cut = batching._Whole.cut

    def wrong(whole: Any, lengths: Any) -> MicroBatch:
        made, (rank, size) = cut(whole, lengths), whole.form.context
        rows = np.arange(whole.tokens.shape[1]).reshape(size, -1)[rank]
        return replace(made, experts=whole.experts[:, rows], recorded=whole.recorded[:, rows])

    patch.setattr(batching._Whole, "cut", wrong)


def _keep_a_stale_microbatch(patch: pytest.MonkeyPatch) -> None:
    """Backward of every microbatch sees the record of the first."""
    enter, first = replay.ReplayContext._enter_backward, []

    def stale(context: Any, routing: Any, gradient: torch.Tensor) -> None:
        first.append(routing)
        same = first[0].recorded.shape == routing.recorded.shape
        enter(context, first[0] if same else routing, gradient)

    patch.setattr(replay.ReplayContext, "_enter_backward", stale)


MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "no record in recompute": _forget_recompute,
    "two layers swapped": _swap_two_layers,
    "no zigzag": _drop_the_zigzag,
    "a stale microbatch in recompute": _keep_a_stale_microbatch,
}
