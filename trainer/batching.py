"""Trajectories -> microbatches in which token, position, label and routing row t stand at the same place.

numpy only. Row t of a microbatch is the forward pass with token t as input: its routing is the record's row t and its
logits predict token t+1. The last token of a trajectory is an input without label and record. A rank gets its own rows:
those of its context-parallel chunks, and of them for its routers those of its sequence-parallel part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from r3.config import TrainerConfig
from r3.errors import RoutingError
from r3.routing import ExpertIds, RoutingTrace, expert_dtype, is_outside
from r3.trainer.records import ContentCheck, check_content, check_ids, name, needed_blocks
from r3.trainer.rows import Bools, Ints, RowClasses
from r3.trainer.sampling import AuditPlan
from r3.types import Batch, ModelSpec, Record, Trajectory

# Makes an array of a shape and dtype.
Empty = Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]]
# [mini-step][microbatch] -> samples, for one rank.
Shares = tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Every trajectory of a step, its record and, flat in their order, what belongs to each response token.

    `records`: of each trajectory (whose own `routing` is None) the blocks of layers that this rank got; None where the
    trajectory was not recorded. `offsets` int64 `[n + 1]`: where a trajectory's response tokens begin;
    `rollout_logprobs` float32 `[T]` nats; `advantages` float32 `[T]`; `audit`: which recorded rows are audited.
    """

    trajectories: tuple[Trajectory, ...]
    records: tuple[Record | None, ...]
    offsets: Ints
    rollout_logprobs: NDArray[np.float32]
    advantages: NDArray[np.float32]
    audit: AuditPlan

    @classmethod
    def join(
        cls, batches: Sequence[Batch], advantages: NDArray[np.float32] | None, spec: ModelSpec, turn: int = 0
    ) -> StepBatch:
        """Join rollout batches; `advantages` float32 `[n]` in the order of their trajectories (None counts as 0).

        `turn`: number of the step, for the choice of audited rows. Raises `RoutingError` when the batches come from
        another model or the advantages do not fit them.
        """
        trajectories = tuple(batch.sample(i) for batch in batches for i in range(len(batch)))
        if advantages is None:
            advantages = np.zeros(len(trajectories), np.float32)
        if advantages.shape != (len(trajectories),):
            raise RoutingError(
                f"advantages have shape {advantages.shape}; the batches hold {len(trajectories)} trajectories"
            )
        if not trajectories:
            raise RoutingError("the step has no trajectory; every sample was dropped")
        model = spec.fingerprint
        for trajectory in trajectories:
            if trajectory.fingerprint != model:
                raise RoutingError(
                    f"{name(trajectory)} was sampled from model {trajectory.fingerprint}, the trainer holds {model}"
                )
        lengths = np.array([trajectory.response_len for trajectory in trajectories], dtype=np.int64)
        return cls(
            trajectories=trajectories,
            records=tuple(record for batch in batches for record in batch.records()),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            rollout_logprobs=np.concatenate([trajectory.logprobs for trajectory in trajectories]),
            advantages=np.repeat(advantages.astype(np.float32), lengths),
            audit=AuditPlan.of(np.concatenate([batch.stored.counts for batch in batches]), turn),
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
class Form:
    """How a rank's microbatches are laid out.

    `packed`: sequences end to end in one row, else one row each, right-padded. `context`, `sequence`: this rank and the
    number of ranks that share the sequences (zigzag) and, of a context rank's rows, those that its routers see
    (Megatron's sequence parallelism). `columns`: MoE layers of this rank's model, as columns of a record; None for all
    of them. `at_least`: rows and length that every microbatch is padded to, where a schedule or dispatcher needs equal
    shapes.
    """

    packed: bool = False
    context: tuple[int, int] = (0, 1)
    sequence: tuple[int, int] = (0, 1)
    columns: tuple[int, ...] | None = None
    at_least: tuple[int, int] = (1, 1)

    @property
    def sequence_unit(self) -> int:
        """A packed sequence is padded to a multiple of this: two equal chunks for every context rank."""
        return 2 * self.context[1] if self.context[1] > 1 else 1

    @property
    def unit(self) -> int:
        """A row of a microbatch is padded to a multiple of this."""
        return math.lcm(self.sequence_unit, self.context[1] * self.sequence[1])

    def lengths(self, tokens: Sequence[int]) -> list[int]:
        """Return the padded length of every packed sequence, a tail of pads included where the row needs one."""
        lengths = [_round_up(size, self.sequence_unit) for size in tokens]
        filled = sum(lengths)
        whole = _round_up(max(filled, self.at_least[1], 1), self.unit)
        return lengths + ([whole - filled] if whole > filled else [])

    def shape(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Return rows and length of the microbatch of sequences with that many `tokens`, before any cut."""
        if self.packed:
            return 1, sum(self.lengths(tokens))
        length = _round_up(max([*tokens, self.at_least[1]]), self.unit)
        return max(len(tokens), self.at_least[0]), length

    def context_rows(self, lengths: Iterable[int]) -> Ints:
        """Return the positions of a row that this context rank works on, sequence by sequence (`lengths`)."""
        (rank, size), begin, parts = self.context, 0, []
        for length in lengths:
            if size == 1:
                parts.append(np.arange(begin, begin + length))
            else:
                chunks = np.arange(begin, begin + length).reshape(2 * size, -1)
                parts += [chunks[rank], chunks[2 * size - 1 - rank]]
            begin += length
        return np.concatenate(parts)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@lru_cache  # the same few tuples for all records of a step
def _columns(block: tuple[int, ...], layers: tuple[int, ...]) -> tuple[slice | list[int], slice | list[int]]:
    """Return which columns of a block's `layers` are wanted, and their places among the wanted `layers`."""
    columns = [column for column, layer in enumerate(block) if layer in layers]
    return _as_slice(columns), _as_slice([layers.index(block[column]) for column in columns])


def _as_slice(indices: list[int]) -> slice | list[int]:
    """Return ascending neighbours as a slice, by which numpy copies in runs and not id by id."""
    begin, end = indices[0], indices[-1] + 1
    return slice(begin, end) if indices == list(range(begin, end)) else indices


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """This rank's part of some trajectories, one row each (right-padded) or packed into one row.

    `tokens`, `positions`, `labels` int64 `[b, s]`; `targets` int64 `[b, s]`: index of the predicted token among the
    step's response tokens (`StepBatch`), -1 where the row is not trained. For the routers, which see `r` of the `s`
    rows under sequence parallelism: `routed_targets` int64 `[b, r]`, their `targets`; `experts` `[b, r, layers, k]` of
    the rank's MoE layers, or None when no trajectory has a record; `recorded`, `filled` and `pads` bool `[b, r]`:
    which rows have a record, which have the ids of another row because nobody reads what becomes of them (pads, and the
    last tokens of recorded sequences), and which are pads; `order` int64 `[b, r]`: place of the row in the uncut
    microbatch; `windows` int64 `[b, r]`: window of the audit that the row is in, -1 for none; `sampled` bool `[b, r]`:
    was the row's token sampled (else it is the prompt's).
    `lengths`: padded length of each packed sequence over all context ranks, None without packing. `shape`: rows and
    length of the uncut microbatch. `rows`: how many rows of it are of which kind.
    """

    tokens: Ints
    positions: Ints
    labels: Ints
    targets: Ints
    routed_targets: Ints
    experts: ExpertIds | None
    recorded: Bools
    filled: Bools
    pads: Bools
    order: Ints
    windows: Ints
    sampled: Bools
    lengths: tuple[int, ...] | None
    shape: tuple[int, int]
    rows: RowClasses


def share(
    trajectories: Sequence[Trajectory],
    *,
    mini_steps: int,
    rank: int,
    world: int,
    micro_batch_size: int,
    multiple: int = 1,
) -> Shares:
    """Return the samples of one data-parallel rank, by mini-step and microbatch.

    Mini-steps take equal shares of the *groups*; inside one, samples are dealt to the ranks in order of length and cut
    into microbatches of similar length. All ranks get the same number of microbatches, a `multiple` of what the
    pipeline schedule needs (some may be empty), and every sample goes to exactly one place. Mini-steps without a sample
    (all dropped) are left out.
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
        parts = _round_up(-(-largest // micro_batch_size), multiple)
        cuts = np.array_split(ordered[rank::world], parts)
        steps.append(tuple(tuple(int(i) for i in cut) for cut in cuts))
    return tuple(steps)


def microbatch(
    step: StepBatch,
    samples: Sequence[int],
    spec: ModelSpec,
    form: Form | None = None,
    check: ContentCheck = check_content,
    empty: Empty = np.empty,
) -> MicroBatch:
    """Lay out the given samples in `form` (default: padded, whole); check every routing record before it is cut.

    `check` looks at the content of records whose form is right, `r3.trainer.records.DeferredChecks` later; `empty`
    makes the array of the records. No sample at all gives a row of pads, which a rank runs to keep in step with the
    others. Raises `RoutingError`.
    """
    form = form or Form()
    sizes = [len(step.trajectories[i].tokens) for i in samples]
    shape = form.shape(sizes)
    lengths = form.lengths(sizes) if form.packed else [shape[1]]
    whole = _Whole(spec, form, shape)
    begins = _begins(lengths)[: len(sizes)] if form.packed else np.arange(len(sizes)) * shape[1]
    whole.place_tokens(step, samples, np.array(sizes, np.int64), begins)
    placed = whole.place_records(step, samples, begins.tolist(), empty)
    whole.require_known_ids(step, samples)
    if whole.experts is not None:
        check(placed)
    if form.packed:
        whole.positions[:] = _runs(np.zeros(len(lengths), np.int64), lengths)
    return whole.cut(lengths)


def _begins(lengths: Sequence[int] | Ints) -> Ints:
    """Return where each of some runs begins that lie one behind the other."""
    return np.cumsum(lengths, dtype=np.int64) - np.asarray(lengths, np.int64)


def _runs(begins: Ints, lengths: Sequence[int] | Ints) -> Ints:
    """Return the numbers of some runs, `lengths[i]` from `begins[i]` on, one run behind the other."""
    return np.repeat(begins - _begins(lengths), lengths) + np.arange(np.sum(lengths, dtype=np.int64))


def _within(begins: Ints, ends: Ints, size: int) -> Bools:
    """Return which of `size` places are in one of some ascending runs `[begin, end)`, bool `[size]`."""
    lengths = np.empty(2 * len(begins) + 1, np.int64)
    lengths[1::2] = ends - begins
    lengths[::2] = np.append(begins, size) - np.append(0, ends)
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)


class _Whole:
    """A microbatch before it is cut to one rank's rows.

    All samples are put in at once: with short ones, most of an assignment is its call.
    """

    def __init__(self, spec: ModelSpec, form: Form, shape: tuple[int, int]) -> None:
        self.spec, self.form = spec, form
        columns = form.columns if form.columns is not None else range(len(spec.moe_layers))
        self.layers = tuple(spec.moe_layers[column] for column in columns)
        self.tokens, self.labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self.positions = np.broadcast_to(np.arange(shape[1]), shape).copy()
        self.targets, self.windows = np.full(shape, -1, np.int64), np.full(shape, -1, np.int64)
        self.recorded, self.sampled = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
        self.pads, self.filled = np.ones(shape, np.bool_), np.zeros(shape, np.bool_)
        self.experts: ExpertIds | None = None
        self.rows = RowClasses(pads=shape[0] * shape[1])
        self._last = np.empty(0, np.int64)

    def place_tokens(self, step: StepBatch, samples: Sequence[int], sizes: Ints, begins: Ints) -> None:
        """Put the samples, of so many tokens, at places `begins`."""
        if not samples:
            return
        chosen = [step.trajectories[i] for i in samples]
        prompts = np.array([trajectory.prompt_len for trajectory in chosen])
        self._last = begins + sizes - 1
        here = _within(begins, begins + sizes, self.tokens.size)
        first = _begins(sizes)
        tokens = np.concatenate([trajectory.tokens for trajectory in chosen])
        labels = np.append(tokens[1:], 0)
        labels[first + sizes - 1] = 0
        trained = _within(first + prompts - 1, first + sizes - 1, len(tokens))
        targets = np.full(len(tokens), -1, np.int64)
        targets[trained] = _runs(step.offsets[np.asarray(samples)], sizes - prompts)
        self.tokens.reshape(-1)[here] = tokens
        self.labels.reshape(-1)[here] = labels
        self.targets.reshape(-1)[here] = targets
        self.pads.reshape(-1)[here] = False
        # The token that a trained row predicts is the next one.
        self.sampled.reshape(-1)[here] = np.append(False, trained[:-1])
        self.rows += RowClasses(rows=len(tokens), missing=len(tokens) - len(chosen), pads=-len(tokens))

    def place_records(
        self, step: StepBatch, samples: Sequence[int], begins: Sequence[int], empty: Empty
    ) -> list[tuple[Trajectory, list[RoutingTrace]]]:
        """Put the records of the samples beside their tokens; return those that have one, with the blocks it took."""
        if all(record is None for record in step.records):
            return []
        shape = (*self.tokens.shape, len(self.layers), self.spec.top_k)
        self.experts = empty(shape, expert_dtype(self.spec.num_experts))
        rows = self.experts.reshape(self.tokens.size, *shape[2:])
        placed, spans, windows = [], [], []
        for i, begin in zip(samples, begins, strict=True):
            record = step.records[i]
            if record is None:
                continue
            trajectory = step.trajectories[i]
            blocks = needed_blocks(trajectory, record, self.spec, self.layers)
            spans += [(begin + span.begin, begin + span.end) for span in record.spans]
            _copy_rows(rows[begin:], record, [(one.experts, *_columns(one.layers, self.layers)) for one in blocks])
            windows.append(step.audit.of_rows(i))
            placed.append((trajectory, blocks))
        if spans:
            first, end = np.array(spans).T
            recorded = _within(first, end, self.recorded.size)
            found = int((end - first).sum())
            self.recorded = recorded.reshape(self.recorded.shape)
            self.windows[self.recorded] = np.concatenate(windows)
            self.rows += RowClasses(required=found, missing=-found)
            self._fill(rows)
        rows[np.flatnonzero(~(self.recorded | self.filled))] = 0
        return placed

    def _fill(self, rows: ExpertIds) -> None:
        """Give a last token the ids of the row before and pads those of recorded rows in turn, if these are there.

        Nothing depends on what becomes of such a row, and a router that need not choose for it costs a GPU five kernels
        less. In turn, because the experts would wait for the one that got all pads.
        """
        recorded, pads = np.flatnonzero(self.recorded), np.flatnonzero(self.pads)
        # The row before one without a record is never a recorded one of another sequence: those end without.
        last = self._last[self.recorded.reshape(-1)[self._last - 1]]
        rows[last] = rows[last - 1]
        rows[pads] = rows[np.resize(recorded, len(pads))]
        filled = self.filled.reshape(-1)
        filled[last] = filled[pads] = True

    def require_known_ids(self, step: StepBatch, samples: Sequence[int]) -> None:
        """Raise `RoutingError` for an id that the model does not have: on a device it would end the process."""
        if self.experts is None or not is_outside(self.experts, self.spec.num_experts):
            return
        for i in samples:
            record = step.records[i]
            if record is not None:
                check_ids(step.trajectories[i], record)

    def cut(self, lengths: Sequence[int]) -> MicroBatch:
        """Return this rank's rows; `lengths` of the sequences in every row."""
        mine: Ints | slice = slice(None)
        routed = mine
        if self.form.context[1] > 1 or self.form.sequence[1] > 1:
            rank, size = self.form.sequence
            mine = self.form.context_rows(lengths)
            routed = mine.reshape(size, -1)[rank]
        order = np.arange(self.tokens.size).reshape(self.tokens.shape)
        return MicroBatch(
            tokens=self.tokens[:, mine],
            positions=self.positions[:, mine],
            labels=self.labels[:, mine],
            targets=self.targets[:, mine],
            routed_targets=self.targets[:, routed],
            experts=None if self.experts is None else self.experts[:, routed],
            recorded=self.recorded[:, routed],
            filled=self.filled[:, routed],
            pads=self.pads[:, routed],
            order=order[:, routed],
            windows=self.windows[:, routed],
            sampled=self.sampled[:, routed],
            lengths=tuple(int(length) for length in lengths) if self.form.packed else None,
            shape=(self.tokens.shape[0], self.tokens.shape[1]),
            rows=self.rows,
        )


def _copy_rows(
    rows: ExpertIds, record: Record, blocks: Sequence[tuple[ExpertIds, slice | list[int], slice | list[int]]]
) -> None:
    """Copy a record into the `rows` from its first token on: of each block the wanted columns, to their places.

    Straight out of the object store: a block is never joined with others or copied as a whole.
    """
    row = 0
    for span in record.spans:
        end = row + span.end - span.begin
        for experts, columns, local in blocks:
            rows[span.begin : span.end, local] = experts[row:end, columns]
        row = end


def plan_step(
    step: StepBatch, trainer: TrainerConfig, mini_steps: int, form: Form, data: tuple[int, int]
) -> tuple[Shares, Form]:
    """Return the samples of data-parallel rank `data` (rank, size) by mini-step and microbatch, and their form."""
    rank, size = data

    def plan(rank: int) -> Shares:
        return share(
            step.trajectories,
            mini_steps=mini_steps,
            rank=rank,
            world=size,
            micro_batch_size=trainer.micro_batch_size,
            # The interleaved schedule runs microbatches in groups of one per stage.
            multiple=trainer.pipeline_parallel if trainer.virtual_pipeline > 1 else 1,
        )

    # The allgather dispatcher joins the rows of all expert-parallel ranks; some pipelines cannot tell shapes.
    joined = trainer.dispatcher == "allgather" and (trainer.expert_parallel > 1 or trainer.pipeline_parallel > 1)
    if joined or trainer.virtual_pipeline > 1:
        form = equal_shapes(step, [plan(other) for other in range(size)], form)
    return plan(rank), form


def equal_shapes(step: StepBatch, plans: Sequence[Shares], form: Form) -> Form:
    """Return `form` with every microbatch of every rank (`plans`) padded to the shape of the largest."""
    shapes = [
        form.shape([len(step.trajectories[i].tokens) for i in samples])
        for plan in plans
        for mini_step in plan
        for samples in mini_step
    ]
    return replace(form, at_least=(max(rows for rows, _ in shapes), max(length for _, length in shapes)))


def require_records(step: StepBatch) -> None:
    """Raise `RoutingError` when a trajectory has no routing record although replay needs one."""
    for trajectory, record in zip(step.trajectories, step.records, strict=True):
        if record is None:
            raise RoutingError(f"{name(trajectory)} has no routing record; replay.mode is r3, so each one needs it")
