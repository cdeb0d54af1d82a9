"""Parts of tensors that several ranks hold come to rank 0 in flat batches, over the backend of their device.

One code path: NCCL carries what lies on GPUs, gloo what lies in host memory (`r3.trainer.parallel.join`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

# What a batch holds where nobody says otherwise; pushes and checkpoints take `weights.bucket_mib`.
BATCH_BYTES = 256 * 2**20
# Batches that hold memory at once, on a sender and on rank 0: one in use, one on its way.
LIVE = 2
# A batch holds tensors of several dtypes; each begins where any dtype may, and where wide copies are fast.
_ALIGNMENT = 16

Local = Callable[[str, int], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `part` of `parts` of the tensor `name`, as its rank describes it to the others."""

    name: str
    part: int
    parts: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the part."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def room(self) -> int:
        """Bytes that it takes in a batch."""
        return -(-self.nbytes // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, slots=True)
class Batch:
    """A run of whole tensors, and where the parts that rank 0 lacks lie in the flat uint8 batch.

    `tensors`: all parts of each, in order. `spans`: rank by rank the bytes `[begin, end)` that it sends. `places`: by
    name and part where that part begins.
    """

    tensors: tuple[tuple[Shard, ...], ...]
    spans: Mapping[int, tuple[int, int]]
    places: Mapping[tuple[str, int], int]

    @property
    def nbytes(self) -> int:
        """Size of the flat batch on rank 0."""
        return max((end for _, end in self.spans.values()), default=0)


@dataclass(frozen=True, slots=True)
class Plan:
    """What all ranks agree on: the batches in order, and the first rank that holds each part."""

    batches: tuple[Batch, ...]
    owners: Mapping[tuple[str, int], int]

    @classmethod
    def of(cls, held: Sequence[Sequence[Shard]], limit: int) -> Plan:
        """Divide what each rank holds into batches of at most `limit` bytes, or one tensor where that is larger.

        Tensors come in the order of rank 0, then those that only later ranks hold, in their order.
        """
        owners: dict[tuple[str, int], int] = {}
        found: dict[str, dict[int, Shard]] = {}
        for rank, shards in enumerate(held):
            for shard in shards:
                owners.setdefault((shard.name, shard.part), rank)
                found.setdefault(shard.name, {}).setdefault(shard.part, shard)
        batches: list[Batch] = []
        run: list[tuple[Shard, ...]] = []
        size = 0
        for parts in found.values():
            whole = tuple(parts[part] for part in range(next(iter(parts.values())).parts))
            more = sum(shard.room for shard in whole if owners[shard.name, shard.part])
            if run and more and size + more > limit:
                batches.append(_batch(run, owners))
                run, size = [], 0
            run.append(whole)
            size += more
        return cls((*batches, _batch(run, owners)), owners)

    @property
    def travels(self) -> bool:
        """Whether rank 0 lacks anything."""
        return any(batch.spans for batch in self.batches)


def _batch(run: Sequence[tuple[Shard, ...]], owners: Mapping[tuple[str, int], int]) -> Batch:
    lacked = [(owners[shard.name, shard.part], shard) for whole in run for shard in whole]
    spans: dict[int, tuple[int, int]] = {}
    places: dict[tuple[str, int], int] = {}
    end = 0
    for owner in sorted({owner for owner, _ in lacked} - {0}):
        begin = end
        for shard in (shard for rank, shard in lacked if rank == owner):
            places[shard.name, shard.part] = end
            end += shard.room
        spans[owner] = begin, end
    return Batch(tuple(run), spans, places)


class ShardGather:
    """Walks over named tensors of which ranks hold parts; the first walk agrees on a `Plan`, which later ones keep.

    `mine`: this rank's parts; `limit`: bytes of a batch. Rank 0 holds `LIVE` batches at most, and so does a rank that
    sends; where nothing travels there is no batch, no copy and no collective but the first.
    """

    def __init__(self, mine: Sequence[Shard], limit: int, device: torch.device) -> None:
        self._mine, self._limit, self._device = tuple(mine), limit, device
        self._plan: Plan | None = None

    @property
    def extra_bytes(self) -> int:
        """Most bytes that batches hold at once on rank 0; 0 before the first walk."""
        sizes = [self._room(batch.nbytes) for batch in self._plan.batches] if self._plan else []
        return max((sum(sizes[first : first + LIVE]) for first in range(len(sizes))), default=0)

    def walk(self, local: Local) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """Yield name and parts of every tensor on rank 0; the other ranks yield nothing and send.

        Collective: every rank must exhaust the iterator. `local` returns a part that this rank holds. The parts of
        other ranks are views of a batch, which lives as long as one of them does.
        """
        plan = self._plan = self._plan or self._agreed()
        rank = dist.get_rank() if dist.is_initialized() else 0
        if rank == 0:
            yield from self._received(plan, local)
        else:
            self._send([batch for batch in plan.batches if rank in batch.spans], plan.owners, rank, local)

    def _agreed(self) -> Plan:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return Plan.of([self._mine], self._limit)
        everywhere: list[Sequence[Shard]] = [()] * dist.get_world_size()
        dist.all_gather_object(everywhere, self._mine)
        plan = Plan.of(everywhere, self._limit)
        if plan.travels:
            # NCCL makes a communicator of all ranks together; after that, two of them may use it alone.
            dist.all_reduce(torch.zeros(1, device=self._device))
        return plan

    def _received(self, plan: Plan, local: Local) -> Iterator[tuple[str, list[torch.Tensor]]]:
        coming = self._receive(plan.batches[0])
        for number, batch in enumerate(plan.batches):
            flat, works = coming
            for work in works:
                work.wait()
            for place, whole in enumerate(batch.tensors):
                yield whole[0].name, [_found(shard, flat, batch, local) for shard in whole]
                if place == 0 and number + 1 < len(plan.batches):
                    # Not before: whoever reads held the last tensor of the batch before until now.
                    coming = self._receive(plan.batches[number + 1])

    def _receive(self, batch: Batch) -> tuple[torch.Tensor, list[dist.Work]]:
        flat = self._flat(batch.nbytes)
        parts = [dist.P2POp(dist.irecv, flat[begin:end], owner) for owner, (begin, end) in batch.spans.items()]
        return flat, dist.batch_isend_irecv(parts) if parts else []

    def _send(self, batches: Sequence[Batch], owners: Mapping[tuple[str, int], int], rank: int, local: Local) -> None:
        going: deque[tuple[torch.Tensor, list[dist.Work]]] = deque()
        for batch in batches:
            if len(going) == LIVE:
                self._sent(*going.popleft())
            begin, end = batch.spans[rank]
            flat = self._flat(end - begin)
            for (name, part), place in batch.places.items():
                if owners[name, part] == rank:
                    data = local(name, part).contiguous().reshape(-1).view(torch.uint8)
                    flat[place - begin : place - begin + len(data)].copy_(data)
            going.append((flat, dist.batch_isend_irecv([dist.P2POp(dist.isend, flat, 0)])))
        while going:
            self._sent(*going.popleft())

    def _flat(self, nbytes: int) -> torch.Tensor:
        return torch.empty(self._room(nbytes), dtype=torch.uint8, device=self._device)[:nbytes]

    def _room(self, nbytes: int) -> int:
        """Return what a batch is given: mostly the same, so that the allocator finds the block of before."""
        return max(nbytes, self._limit) if nbytes else 0

    def _sent(self, _: torch.Tensor, works: Sequence[dist.Work]) -> None:
        """Wait for one batch, which must not be freed before; once a batch, so that its time limit is its own."""
        for work in works:
            work.wait()
        if self._device.type == "cuda":
            # NCCL lets only the stream wait.
            torch.cuda.current_stream(self._device).synchronize()


def _found(shard: Shard, flat: torch.Tensor, batch: Batch, local: Local) -> torch.Tensor:
    begin = batch.places.get((shard.name, shard.part))
    if begin is None:
        return local(shard.name, shard.part)
    return flat[begin : begin + shard.nbytes].view(shard.dtype).reshape(shard.shape)
