"""The routing records of a step as a trainer rank meets them: which blocks it needs, and what it checks of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType

from r3.errors import RoutingError
from r3.routing import ExpertIds, RoutingTrace, check_distinct, check_range
from r3.structure import has_repeats
from r3.trainer.rows import Bools
from r3.types import ModelSpec, Record, Trajectory


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """The records of a microbatch and where they were put.

    `experts` `[b, s, layers, k]`: the rank's layers; `recorded` bool `[b, s]`: its rows with a record; `records`: each
    trajectory and the blocks that it was put from.
    """

    experts: ExpertIds
    recorded: Bools
    records: tuple[tuple[Trajectory, Sequence[RoutingTrace]], ...]


# Microbatches whose checks wait for the end of a pass. In a longer one a GPU has work ahead, and they would be many.
HELD = 4

ContentCheck = Callable[[Placed], None]


def check_content(placed: Placed) -> None:
    """Raise `RoutingError` unless rows name k distinct experts and are those that the rollout sealed with its tokens.

    The form of the blocks (`needed_blocks`) is right already.
    """
    # At once: with short records, most of a check is its call.
    repeated = has_repeats(placed.experts[placed.recorded])
    for trajectory, blocks in placed.records:
        try:
            for block in blocks:
                if repeated:
                    check_distinct(block.experts, block.layers)
                block.verify(trajectory.tokens)
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
    """Checks the content of records in a thread, beside a pass that only reads them.

    Give it to `microbatch`, and `finish` it before anything is trained on the records. As a context it finishes at the
    end; what a broken record made of the block is raised as the `RoutingError` that caused it. The checks are numpy's
    and zlib's work, which let go of the interpreter meanwhile; but they want it back every 20 us, and each time the
    thread that feeds a GPU waits: a check costs it as long as it takes. So with `hold` they begin with `begin`, when
    that thread has nothing left but to wait, two at a time; of more than `HELD` microbatches, the oldest begin before.
    """

    def __init__(self, *, hold: bool = False) -> None:
        self._threads = ThreadPoolExecutor(2 if hold else 1, thread_name_prefix="r3-record-checks")
        self._most = HELD if hold else 0
        self._held: deque[Placed] = deque()
        self._running: list[Future[None]] = []

    def __call__(self, placed: Placed) -> None:
        """Check the records of one microbatch beside."""
        self._held.append(placed)
        self._begin(self._most)

    def begin(self) -> None:
        """Begin with what is held."""
        self._begin(0)

    def _begin(self, left: int) -> None:
        while len(self._held) > left:
            self._running.append(self._threads.submit(check_content, self._held.popleft()))

    def finish(self) -> None:
        """Wait for all checks; raise the `RoutingError` of the first record that failed."""
        self.begin()
        for one in self._running:
            one.result()

    def __enter__(self) -> DeferredChecks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()


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
