"""The routing records of a step as a trainer rank meets them: which blocks it needs, and what it checks of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
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


ContentCheck = Callable[[Placed], None]


def check_content(placed: Placed) -> None:
    """Raise `RoutingError` unless rows name k distinct experts and are those that the rollout sealed with its tokens.

    The form of the blocks (`needed_blocks`) is right already.
    """
    # At once: with short records, most of a check is its call.
    repeated = has_repeats(placed.experts[placed.recorded])
    for trajectory, blocks in placed.records:
        for block in blocks:
            with _named(trajectory):
                if repeated:
                    check_distinct(block.experts, block.layers)
                block.verify(trajectory.tokens)


def check_ids(trajectory: Trajectory, record: Record) -> None:
    """Raise `RoutingError` that names the trajectory where its record has an id that the model does not have."""
    for block in record.blocks:
        with _named(trajectory):
            check_range(block.experts, block.num_experts)


class DeferredChecks:
    """Checks the content of records in a thread, beside a pass that only reads them.

    Give it to `microbatch`, and `finish` it before anything is trained on the records. As a context it finishes at the
    end; what a broken record made of the block is raised as the `RoutingError` that caused it. The checks are numpy's
    and zlib's work, which let go of the interpreter meanwhile, but each time they want it back the thread that feeds a
    GPU waits. With `hold` a microbatch's checks begin with the next one or with `begin`, when the GPU has work ahead.
    """

    def __init__(self, *, hold: bool = False) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="r3-record-checks")
        self._hold = hold
        self._held: Placed | None = None
        self._running: list[Future[None]] = []

    def __call__(self, placed: Placed) -> None:
        """Check the records of one microbatch beside, those that are held before them."""
        self.begin()
        self._held = placed
        if not self._hold:
            self.begin()

    def begin(self) -> None:
        """Begin with what is held."""
        if self._held is not None:
            self._running.append(self._thread.submit(check_content, self._held))
            self._held = None

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
    needed = [block for block in record.blocks if _meet(block.layers, layers)]
    for block in record.blocks:
        experts = (block.num_experts, block.top_k)
        if experts != (spec.num_experts, spec.top_k) or not _fit(block.layers, spec.moe_layers):
            raise RoutingError(
                f"{name(trajectory)}: the record is for layers, experts, top-k "
                f"{(block.layers, *experts)}, "
                f"the model has {(spec.moe_layers, spec.num_experts, spec.top_k)}"
            )
    absent = _absent(layers, tuple(block.layers for block in needed))
    if absent:
        raise RoutingError(f"{name(trajectory)}: the blocks of its record that came lack MoE layers {absent}")
    for block in needed:
        with _named(trajectory):
            block.validate_form(len(trajectory.tokens))
    return needed


# The same few tuples for all records of a step.
@lru_cache
def _meet(block: tuple[int, ...], layers: tuple[int, ...]) -> bool:
    return not set(layers).isdisjoint(block)


@lru_cache
def _fit(block: tuple[int, ...], layers: tuple[int, ...]) -> bool:
    return block == tuple(layer for layer in layers if layer in block)


@lru_cache
def _absent(layers: tuple[int, ...], blocks: tuple[tuple[int, ...], ...]) -> list[int]:
    return sorted(set(layers).difference(*blocks))


@contextmanager
def _named(trajectory: Trajectory) -> Iterator[None]:
    try:
        yield
    except RoutingError as error:
        raise RoutingError(f"{name(trajectory)}: {error}") from error


def name(trajectory: Trajectory) -> str:
    """Name a trajectory in an error message."""
    return f"trajectory (group {trajectory.group}, member {trajectory.member})"
