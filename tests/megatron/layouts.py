"""What the layout tests and `scripts/bench/layouts.py` run in every rank, and the layouts that they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from r3.config import Config
from r3.metrics import RouterCounts
from r3.trainer import batching, replay
from r3.trainer.batching import MicroBatch, StepBatch, microbatch, plan_step
from r3.trainer.convert import export_weights
from r3.trainer.model import Architecture
from r3.trainer.parallel import sum_over_ranks
from r3.trainer.policy import Policy, RoutingUse
from r3.types import Batch
from tests.gloo_pool import arranged
from tests.megatron.toys import make_advantages, make_config

Tensors = dict[str, NDArray[np.float32]]

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


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one step of one layout gave, the same on every rank but `gradients` and `weights`, which rank 0 has.

    `loss`: mean over trained tokens; `gradients`, `weights`: by Hugging Face name; `counts`: over all ranks.
    """

    loss: float
    logprobs: NDArray[np.float64]
    gradients: Tensors
    weights: Tensors
    counts: RouterCounts
    replay_s: float


def layout_config(changes: dict[str, Any], world: int, **sections: dict[str, Any]) -> Config:
    """Return a config with the layout `changes` over `world` ranks."""
    trainer = {"processes": world, "micro_batch_size": 3} | sections.pop("trainer", {}) | changes
    return make_config(trainer=trainer, **sections)


def run_layout(config: Config, directory: Path, batch: Batch, force: bool = True) -> Outcome:
    """Run log-probs and one update in the config's layout; collective over the ranks of the pool."""
    with arranged(config.trainer):
        policy = Policy(config, Architecture.from_directory(directory), directory, updates=10)
        return run_policy(policy, config, batch, RoutingUse(force=force))


def run_policy(policy: Policy, config: Config, batch: Batch, use: RoutingUse) -> Outcome:
    """Run log-probs and one update of `policy` on `batch`."""
    step, microbatches = laid_out(policy, config, batch)
    old = step.rollout_logprobs.astype(np.float64)
    before = policy.logprobs(microbatches, step, use)
    policy.replay.require_empty("after a forward-only pass")
    sums, counts, replay_s = policy.accumulate(microbatches, step, old, None, use)
    policy.replay.require_empty("after a step")
    gradients = exported(policy, lambda parameter: parameter.main_grad)
    policy.optimizer.step()
    tokens, loss = sum_over_ranks(np.array([sums.tokens, sums.loss]))
    return Outcome(
        loss=loss / tokens,
        logprobs=sum_over_ranks(before.logprobs),
        gradients=gradients,
        weights=exported(policy, torch.Tensor.detach),
        counts=total(counts),
        replay_s=replay_s,
    )


def laid_out(policy: Policy, config: Config, batch: Batch) -> tuple[StepBatch, list[MicroBatch]]:
    """Return the step and this rank's microbatches of its only mini-step, in the policy's form."""
    spec = policy._arch.spec
    step = StepBatch.join([batch], make_advantages(batch), spec)
    plan, form = plan_step(step, config.trainer, 1, policy.form, policy.data)
    return step, [microbatch(step, samples, spec, form) for samples in plan[0]]


def exported(policy: Policy, value: Any) -> Tensors:
    """Return a tensor of every parameter under Hugging Face names, on rank 0."""
    return {name: t.float().numpy().copy() for name, t in export_weights(policy.chunks, policy._arch, value)}


def total(counts: RouterCounts) -> RouterCounts:
    """Add the counters of all ranks."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, counts)
    return sum(everywhere[1:], everywhere[0])


def worst_difference(found: Tensors, expected: Tensors) -> tuple[float, str]:
    """Return the largest |difference| of a tensor relative to its largest element, and the tensor's name."""
    assert found.keys() == expected.keys()
    scored = [
        (float(np.abs(found[name] - tensor).max() / (np.abs(tensor).max() + 1e-20)), name)
        for name, tensor in expected.items()
    ]
    return max(scored)


def run_mutated(config: Config, directory: Path, batch: Batch, mutation: str) -> Outcome:
    """`run_layout` with one thing made wrong."""
    with arranged(config.trainer), pytest.MonkeyPatch.context() as patch:
        MUTATIONS[mutation](patch)
        policy = Policy(config, Architecture.from_directory(directory), directory, updates=10)
        return run_policy(policy, config, batch, RoutingUse(force=True))


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
