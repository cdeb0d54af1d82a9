"""Trajectories -> microbatches in which token, position, label and routing row t stand at the same place.

numpy only. Row t of a microbatch is the forward pass with token t as input: its routing is the record's row t and its
logits predict token t+1. The last token of a trajectory is an input without label and record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from r3.errors import RoutingError
from r3.routing import ExpertIds, expert_dtype
from r3.trainer.rows import RowClasses
from r3.types import Batch, ModelSpec, Trajectory

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
# [mini-step][microbatch] -> samples, for one rank.
Shares = tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Every trajectory of a step and, flat in their order, what belongs to each response token.

    `offsets` int64 `[n + 1]`: where a trajectory's response tokens begin; `rollout_logprobs` float32 `[T]` nats;
    `advantages` float32 `[T]`.
    """

    trajectories: tuple[Trajectory, ...]
    offsets: Ints
    rollout_logprobs: NDArray[np.float32]
    advantages: NDArray[np.float32]

    @classmethod
    def join(cls, batches: Sequence[Batch], advantages: NDArray[np.float32] | None, spec: ModelSpec) -> StepBatch:
        """Join rollout batches; `advantages` float32 `[n]` in the order of their trajectories (None counts as 0).

        Raises `RoutingError` when the batches come from another model or the advantages do not fit them.
        """
        trajectories = tuple(trajectory for batch in batches for trajectory in batch.trajectories())
        if advantages is None:
            advantages = np.zeros(len(trajectories), np.float32)
        if advantages.shape != (len(trajectories),):
            raise RoutingError(
                f"advantages have shape {advantages.shape}; the batches hold {len(trajectories)} trajectories"
            )
        if not trajectories:
            raise RoutingError("the step has no trajectory; every sample was dropped")
        for trajectory in trajectories:
            if trajectory.fingerprint != spec.fingerprint:
                raise RoutingError(
                    f"{name(trajectory)} was sampled from model {trajectory.fingerprint}, "
                    f"the trainer holds {spec.fingerprint}"
                )
        lengths = np.array([trajectory.response_len for trajectory in trajectories], dtype=np.int64)
        return cls(
            trajectories=trajectories,
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            rollout_logprobs=np.concatenate([trajectory.logprobs for trajectory in trajectories]),
            advantages=np.repeat(advantages.astype(np.float32), lengths),
        )

    @property
    def response_lengths(self) -> Ints:
        """Response tokens of each trajectory, `[n]`."""
        return np.diff(self.offsets)

    @property
    def tokens(self) -> int:
        """Tokens of all trajectories, prompts included."""
        return sum(len(trajectory.tokens) for trajectory in self.trajectories)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some trajectories, right-padded to the longest.

    `tokens`, `positions`, `labels` int64 `[b, s]`; `targets` int64 `[b, s]`: index of the predicted token among the
    step's response tokens (`StepBatch`), -1 where the row is not trained; `experts` `[b, s, layers, k]` or None when no
    trajectory has a record; `recorded` bool `[b, s]`; `rows`: how many rows are of which kind.
    """

    tokens: Ints
    positions: Ints
    labels: Ints
    targets: Ints
    experts: ExpertIds | None
    recorded: Bools
    rows: RowClasses


def share(
    trajectories: Sequence[Trajectory], *, mini_steps: int, rank: int, world: int, micro_batch_size: int
) -> Shares:
    """Return the samples of one data-parallel rank, by mini-step and microbatch.

    Mini-steps take equal shares of the *groups*; inside one, samples are dealt to the ranks in order of length and cut
    into microbatches of similar length. All ranks get the same number of microbatches (some may be empty), and every
    sample goes to exactly one place. Mini-steps without a sample (all dropped) are left out.
    """
    groups = np.array([trajectory.group for trajectory in trajectories])
    lengths = np.array([len(trajectory.tokens) for trajectory in trajectories])
    steps = []
    for part in np.array_split(np.unique(groups), mini_steps):
        members = np.flatnonzero(np.isin(groups, part))
        if not len(members):
            continue
        ordered = members[np.argsort(-lengths[members], kind="stable")]
        largest = -(-len(ordered) // world)
        cuts = np.array_split(ordered[rank::world], -(-largest // micro_batch_size))
        steps.append(tuple(tuple(int(i) for i in cut) for cut in cuts))
    return tuple(steps)


def microbatch(step: StepBatch, samples: Sequence[int], spec: ModelSpec) -> MicroBatch:
    """Pad and align the given samples; check every routing record before it is used.

    No sample at all gives one padded row, which a rank runs to keep in step with the others. Raises `RoutingError`.
    """
    chosen = [step.trajectories[i] for i in samples]
    shape = (max(len(chosen), 1), max((len(trajectory.tokens) for trajectory in chosen), default=1))
    tokens, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    targets, recorded = np.full(shape, -1, np.int64), np.zeros(shape, np.bool_)
    captured = any(trajectory.routing is not None for trajectory in step.trajectories)
    experts = np.zeros((*shape, len(spec.moe_layers), spec.top_k), expert_dtype(spec.num_experts)) if captured else None
    rows = RowClasses(pads=shape[0] * shape[1])
    for b, (i, trajectory) in enumerate(zip(samples, chosen, strict=True)):
        size, prompt = len(trajectory.tokens), trajectory.prompt_len
        tokens[b, :size] = trajectory.tokens
        labels[b, : size - 1] = trajectory.tokens[1:]
        targets[b, prompt - 1 : size - 1] = np.arange(step.offsets[i], step.offsets[i + 1])
        found = 0
        if trajectory.routing is not None and experts is not None:
            where = positions_of_record(trajectory, spec)
            experts[b, where], recorded[b, where], found = trajectory.routing.experts, True, len(where)
        rows += RowClasses(rows=size, required=found, missing=size - 1 - found, pads=-size)
    positions = np.broadcast_to(np.arange(shape[1]), shape)
    return MicroBatch(tokens, positions, labels, targets, experts, recorded, rows)


def positions_of_record(trajectory: Trajectory, spec: ModelSpec) -> Ints:
    """Check a trajectory's record against the model and its own tokens; return the position of every row, `[rows]`.

    Raises `RoutingError` that names the trajectory.
    """
    trace = trajectory.routing
    assert trace is not None
    made_for = (trace.layers, trace.num_experts, trace.top_k)
    if made_for != (spec.moe_layers, spec.num_experts, spec.top_k):
        raise RoutingError(
            f"{name(trajectory)}: the record is for layers, experts, top-k {made_for}, "
            f"the model has {(spec.moe_layers, spec.num_experts, spec.top_k)}"
        )
    try:
        trace.validate(len(trajectory.tokens))
        trace.verify(trajectory.tokens)
    except RoutingError as error:
        raise RoutingError(f"{name(trajectory)}: {error}") from error
    return trace.positions()


def require_records(step: StepBatch) -> None:
    """Raise `RoutingError` when a trajectory has no routing record although replay needs one."""
    for trajectory in step.trajectories:
        if trajectory.routing is None:
            raise RoutingError(f"{name(trajectory)} has no routing record; replay.mode is r3, so each one needs it")


def name(trajectory: Trajectory) -> str:
    """Name a trajectory in an error message."""
    return f"trajectory (group {trajectory.group}, member {trajectory.member})"
