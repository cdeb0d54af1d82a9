"""How batches move from rollout workers to trainer ranks: by handle, in blocks of layers, mapped and not copied.

A rank that is given handles fetches the core of every batch and the blocks with its own layers, and reports where in
memory the blocks lie. Ranks of one node map the same pages of the node's object store, whatever they share of a model.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray
from ray import ObjectRef
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from r3.errors import CheckpointError, R3Error
from r3.record import write_records
from r3.types import Batch, RoutingBlock

_MAPS = Path("/proc/self/maps")


class BlockRef(NamedTuple):
    """Reference to a `RoutingBlock` (None in a batch without a record), and its MoE layers."""

    layers: tuple[int, ...]
    ref: ObjectRef


@dataclass(frozen=True, slots=True)
class BatchRef:
    """Handle of a `Batch`: a reference to the core (all but the blocks), and one to each block."""

    core: ObjectRef
    blocks: tuple[BlockRef, ...]

    @classmethod
    def put(cls, batch: Batch) -> BatchRef:
        """Put a batch into the object store; it lives as long as this process, unlike one that a worker returns."""
        core, *blocks = split(batch, len(batch.blocks))
        layers = [block.layers for block in batch.blocks]
        return cls(ray.put(core), tuple(map(BlockRef, layers, map(ray.put, blocks))))

    def get(self) -> Batch:
        """Fetch the whole batch."""
        return fetch([self])[0][0]


@dataclass(frozen=True, slots=True)
class Saving:
    """Records on their way to a file, written by a task on the driver's node: none passes through the driver."""

    path: Path
    written: ObjectRef

    @classmethod
    def start(cls, path: Path, batches: Sequence[BatchRef]) -> Saving:
        """Begin to write every record of `batches`, with its tokens, in the order of their trajectories."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # No CPU of its own: the actors may hold them all, and the task would wait for the end of the run.
        task = ray.remote(_save).options(num_cpus=0, max_retries=0, scheduling_strategy=here)
        return cls(path, task.remote(path, list(batches)))

    def wait(self) -> int:
        """Wait for the file and return its number of records.

        Raises `RoutingError` for a record that is wrong, `CheckpointError` where the file could not be written.
        """
        try:
            count: int = ray.get(self.written)
        except RayTaskError as error:
            if isinstance(error.cause, R3Error):
                raise error.cause from error
            raise CheckpointError(f"{self.path} was not written: {error.cause!r}") from error
        except RayError as error:
            raise CheckpointError(f"{self.path} was not written: {error}") from error
        return count


def _save(path: Path, handles: Sequence[BatchRef]) -> int:
    batches, _ = fetch(handles)
    samples = (batch.trajectory(i) for batch in batches for i in range(len(batch)))
    return write_records(path, ((one.routing, one.tokens) for one in samples if one.routing is not None))


class Page(NamedTuple):
    """Where an array begins in a shared mapping; two processes that name the same page hold one copy."""

    device: str
    inode: int
    offset: int


class Mapped(NamedTuple):
    """A block in one rank's memory: index of its batch, layers, bytes; `page` None where the memory is private."""

    batch: int
    layers: tuple[int, ...]
    nbytes: int
    page: Page | None


@dataclass(frozen=True, slots=True)
class Fetched:
    """What one rank fetched: its Ray node, the seconds that it waited, and every block."""

    node: str
    seconds: float
    blocks: tuple[Mapped, ...]


def split(batch: Batch, blocks: int) -> tuple[Batch | RoutingBlock | None, ...]:
    """Return the core of a batch and its blocks; None for each of `blocks` that a batch without a record lacks."""
    lacking = [None] * (blocks - len(batch.blocks))
    return replace(batch, blocks=()), *batch.blocks, *lacking


def fetch(handles: Sequence[BatchRef], layers: Sequence[int] | None = None) -> tuple[list[Batch], Fetched]:
    """Return every batch with the blocks that hold any of these MoE layers (default: all), and where they lie."""
    begin = time.perf_counter()
    needed = [
        (handle.core, *(ref for held, ref in handle.blocks if layers is None or not set(layers).isdisjoint(held)))
        for handle in handles
    ]
    # All at once, so that what lies on other nodes travels side by side.
    found = iter(ray.get([ref for refs in needed for ref in refs]))
    batches = []
    for refs in needed:
        core, *blocks = islice(found, len(refs))
        batches.append(replace(core, blocks=tuple(block for block in blocks if block is not None)))
    seconds = time.perf_counter() - begin
    filled = [(i, block) for i, batch in enumerate(batches) for block in batch.blocks if block.nbytes]
    # An object lies in one place, so its first array says where.
    where = pages([block.stored[0] for _, block in filled])
    mapped = [Mapped(i, b.layers, b.nbytes, page) for (i, b), page in zip(filled, where, strict=True)]
    return batches, Fetched(ray.get_runtime_context().get_node_id(), seconds, tuple(mapped))


def pages(arrays: Sequence[NDArray[np.generic]]) -> list[Page | None]:
    """Return of each array where it begins in a shared mapping, None where it lies in memory of this process.

    The object store is one file for all objects, so only inode *and* offset tell copies apart. Read from
    `/proc/self/maps`; raises `OSError` on a system without it.
    """
    ranges = []
    for line in _MAPS.read_text().splitlines():
        span, access, offset, device, inode, *_ = line.split()
        if access.endswith("s"):
            begin, end = (int(bound, 16) for bound in span.split("-"))
            ranges.append((begin, end, int(offset, 16), device, int(inode)))

    def page(address: int) -> Page | None:
        for begin, end, offset, device, inode in ranges:
            if begin <= address < end:
                return Page(device, inode, address - begin + offset)
        return None

    return [page(array.ctypes.data) for array in arrays]


def transport_metrics(ranks: Sequence[Fetched]) -> dict[str, float]:
    """Return `transport/get_s` (slowest rank) and `transport/node_copies`: most copies of a block on one node."""
    copies: dict[tuple[str, int, tuple[int, ...]], list[Page | None]] = defaultdict(list)
    for rank in ranks:
        for block in rank.blocks:
            copies[rank.node, block.batch, block.layers].append(block.page)
    report = {"transport/get_s": max(rank.seconds for rank in ranks)}
    if copies:
        # Private memory is a copy for each rank.
        counts = [len(set(found) - {None}) + found.count(None) for found in copies.values()]
        report["transport/node_copies"] = float(max(counts))
    return report
