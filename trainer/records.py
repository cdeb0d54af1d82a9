"""The routing records of a step as a trainer rank meets them: which blocks it needs, and what it checks of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from types import TracebackType

from r3.errors import RoutingError
from r3.routing import RoutingTrace, check_distinct, check_range
from r3.types import ModelSpec, Record, Trajectory

# Records of a microbatch: each trajectory that has one, and the blocks of it that hold layers of this rank.
Recorded = Sequence[tuple[Trajectory, Sequence[RoutingTrace]]]
ContentCheck = Callable[[Recorded], None]


def check_content(records: Recorded) -> None:
    """Raise `RoutingError` unless rows name k distinct experts and are those that the rollout sealed with its tokens.

    The form of the blocks (`needed_blocks`) is right already.
    """
    check_experts(records)
    check_seals(records)


def check_seals(records: Recorded) -> None:
    """Raise `RoutingError` unless the rows are those that the rollout sealed with its tokens."""
    _check_blocks(records, lambda trajectory, block: block.verify(trajectory.tokens))


def check_experts(records: Recorded) -> None:
    """Raise `RoutingError` unless rows name k distinct experts."""
    _check_blocks(records, lambda trajectory, block: check_distinct(block.experts, block.layers))


def _check_blocks(records: Recorded, check: Callable[[Trajectory, RoutingTrace], None]) -> None:
    for trajectory, blocks in records:
        try:
            for block in blocks:
                check(trajectory, block)
        except RoutingError as error:
            raise _named(trajectory, error) from error


def check_ids(trajectory: Trajectory, record: Record) -> None:
    """Raise `RoutingError` that names the trajectory where its record has an id that the model does not have."""
    try:
        for block in record.blocks:
            check_range(block.experts, block.num_experts)
    except RoutingError as error:
        raise _named(trajectory, error) from error


class DeferredChecks:
    """Checks the content of records behind the work that a device can begin with meanwhile.

    Give it to `microbatch`, and `finish` it before anything is trained on the records. As a context it finishes at the
    end; what a broken record made of the block is raised as the `RoutingError` that caused it.

    The seals of a microbatch are checked when the next one is laid out, those of the last when a pass has handed over
    its work (`finish`). In a thread beside the pass they would not be free: each record wants the interpreter back, and
    the thread that feeds a GPU waits as long as the check takes. That a row names k distinct experts is seen where the
    rows are counted (`r3.trainer.tally.Tally.repeated`); which record does not is looked for when the block has failed.
    """

    def __init__(self) -> None:
        self._seen: list[Recorded] = []
        self._sealed = 0

    def __call__(self, records: Recorded) -> None:
        """Take the records of one microbatch; raise the `RoutingError` of the one before."""
        self.finish()
        self._seen.append(records)

    def finish(self) -> None:
        """Check what is left; raise the `RoutingError` of the first record that is not as it was sealed."""
        for records in self._seen[self._sealed :]:
            check_seals(records)
            self._sealed += 1

    def __enter__(self) -> DeferredChecks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()
        if error is not None:
            for records in self._seen:
                check_experts(records)


def needed_blocks(
    trajectory: Trajectory, record: Record, spec: ModelSpec, layers: tuple[int, ...]
) -> list[RoutingTrace]:
    """Return the blocks that hold any of a rank's `layers`, of a form that fits the model and the trajectory.

    Raises `RoutingError` that names the trajectory, also when a layer is in none of the blocks.
    """
    experts = (spec.num_experts, spec.top_k)
    held = tuple(block.layers for block in record.blocks)
    fitting, places, absent = _roles(held, layers, spec.moe_layers)
    for block, fits in zip(record.blocks, fitting, strict=True):
        found = (block.num_experts, block.top_k)
        if found != experts or not fits:
            raise RoutingError(
                f"{name(trajectory)}: the record is for layers, experts, top-k "
                f"{(block.layers, *found)}, "
                f"the model has {(spec.moe_layers, *experts)}"
            )
    if absent:
        raise RoutingError(f"{name(trajectory)}: the blocks of its record that came lack MoE layers {list(absent)}")
    needed = [record.blocks[place] for place in places]
    size = len(trajectory.tokens)
    try:
        for block in needed:
            block.validate_form(size)
    except RoutingError as error:
        raise _named(trajectory, error) from error
    return needed


# The same few tuples for all records of a step.
@lru_cache
def _roles(
    held: tuple[tuple[int, ...], ...], layers: tuple[int, ...], model: tuple[int, ...]
) -> tuple[tuple[bool, ...], tuple[int, ...], tuple[int, ...]]:
    """Return which blocks fit the model, the places of those that have any of `layers`, and the layers in none."""
    fitting = tuple(block == tuple(layer for layer in model if layer in block) for block in held)
    places = tuple(place for place, block in enumerate(held) if not set(layers).isdisjoint(block))
    return fitting, places, tuple(sorted(set(layers).difference(*held)))


def _named(trajectory: Trajectory, error: RoutingError) -> RoutingError:
    return RoutingError(f"{name(trajectory)}: {error}")


def name(trajectory: Trajectory) -> str:
    """Name a trajectory in an error message."""
    return f"trajectory (group {trajectory.group}, member {trajectory.member})"
