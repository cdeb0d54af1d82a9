"""The routing records of a step as a trainer rank meets them: which blocks it needs, and what it checks of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from types import TracebackType

from r3.errors import RoutingError
from r3.routing import RoutingTrace, check_distinct
from r3.types import ModelSpec, Record, Trajectory

ContentCheck = Callable[[Trajectory, Sequence[RoutingTrace]], None]


def check_content(trajectory: Trajectory, blocks: Sequence[RoutingTrace]) -> None:
    """Raise `RoutingError` unless rows name k distinct experts and are those that the rollout sealed with its tokens.

    The form of `blocks` (`needed_blocks`) is right already.
    """
    for block in blocks:
        try:
            check_distinct(block.experts, block.layers)
            block.verify(trajectory.tokens)
        except RoutingError as error:
            raise RoutingError(f"{name(trajectory)}: {error}") from error


class DeferredChecks:
    """Checks the content of records in a thread, beside a pass that only reads them.

    Give it to `microbatch`, `start` it behind each, and `finish` it before anything is trained on the records. As a
    context it finishes at the end; what a broken record made of the block is raised as the `RoutingError` that caused
    it. The checks are numpy's and zlib's work, which let go of the interpreter meanwhile.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="r3-record-checks")
        self._noted: list[tuple[Trajectory, Sequence[RoutingTrace]]] = []
        self._running: list[Future[None]] = []

    def __call__(self, trajectory: Trajectory, blocks: Sequence[RoutingTrace]) -> None:
        """Note the blocks of one record."""
        self._noted.append((trajectory, blocks))

    def start(self) -> None:
        """Begin to check what was noted since the last call."""
        if self._noted:
            self._running.append(self._thread.submit(_check_all, self._noted))
            self._noted = []

    def finish(self) -> None:
        """Wait for the checks that were started; raise the `RoutingError` of the first record that failed."""
        for one in self._running:
            one.result()

    def __enter__(self) -> DeferredChecks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()


def _check_all(noted: Sequence[tuple[Trajectory, Sequence[RoutingTrace]]]) -> None:
    for trajectory, blocks in noted:
        check_content(trajectory, blocks)


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
        try:
            block.validate_form(len(trajectory.tokens))
        except RoutingError as error:
            raise RoutingError(f"{name(trajectory)}: {error}") from error
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


def name(trajectory: Trajectory) -> str:
    """Name a trajectory in an error message."""
    return f"trajectory (group {trajectory.group}, member {trajectory.member})"
