"""Weights cut into flat buckets on the device: one is filled while the engines copy the one before."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from r3.errors import EngineError
from r3.weights import MemoryHandle, TensorSlot
from r3.weightsum import weight_checksum

# Buckets that live at once: one that is being read, one that is being filled.
LIVE = 2


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """A filled bucket: `flat` uint8 `[nbytes]` on the device, its slots, and its checksum where one was asked for."""

    number: int
    slots: tuple[TensorSlot, ...]
    flat: torch.Tensor
    last: bool
    checksum: int | None


class BucketStream:
    """Takes named tensors one by one and hands them out as buckets, at most `LIVE` of which hold memory at once.

    Tensors are cast and copied straight into the bucket. `shared`: on a CPU, buckets lie in shared memory that other
    processes can open. A tensor larger than `bucket_bytes` has a bucket of its own.
    """

    def __init__(
        self,
        tensors: Iterator[tuple[str, torch.Tensor]],
        dtype: torch.dtype,
        bucket_bytes: int,
        device: torch.device,
        *,
        shared: bool = False,
        verify: bool = True,
    ) -> None:
        self._tensors, self._dtype, self._capacity = tensors, dtype, bucket_bytes
        self._device, self._shared, self._verify = device, shared, verify
        self._live: dict[int, Bucket] = {}
        self._issued: dict[int, tuple[MemoryHandle, ...]] = {}
        self._next: tuple[str, torch.Tensor] | None = None
        self._number = 0
        self.checksums: list[int] = []
        self.nbytes = 0
        self.extra_bytes = 0
        self.seconds = 0.0
        self._advance()

    @property
    def live(self) -> int:
        """Number of buckets that hold memory."""
        return len(self._live)

    def fill(self, released: int) -> Bucket:
        """Free the buckets up to number `released`, which every reader has copied, and fill the next one.

        Raises `EngineError` when nothing is left, or when two buckets are still being read.
        """
        begin = time.perf_counter()
        self.release(released)
        if self.live >= LIVE:
            raise EngineError(f"buckets {sorted(self._live)} of the weights are still being read")
        if self._next is None:
            raise EngineError(f"all {self._number} buckets of the weights have been handed out")
        bucket = self._filled()
        self._live[bucket.number] = bucket
        self._number += 1
        self.nbytes += bucket.flat.numel()
        held = sum(one.flat.untyped_storage().nbytes() for one in self._live.values())
        self.extra_bytes = max(self.extra_bytes, held)
        self.seconds += time.perf_counter() - begin
        return bucket

    def share(self, bucket: Bucket, readers: int) -> tuple[MemoryHandle, ...]:
        """Return a handle of a filled bucket for each of its readers; `take_back` those that nobody opens."""
        made = self._issued[bucket.number] = tuple(handle(bucket) for _ in range(readers))
        return made

    def take_back(self, handed: int, unread: Sequence[int]) -> None:
        """Give up handles that nobody will close, which would keep their buckets for as long as this process lives.

        These are all of the buckets behind number `handed`, and of that one those of the readers `unread`, by place:
        they died before they were done with it. The other readers open and close theirs, however late.
        """
        for number, made in self._issued.items():
            gone = made if number > handed else [made[reader] for reader in unread] if number == handed else ()
            for one in gone:
                give_up(self._live[number], one)

    def release(self, upto: int) -> None:
        """Free the buckets up to number `upto`."""
        for number in [number for number in self._live if number <= upto]:
            del self._live[number]
            self._issued.pop(number, None)
        if self._device.type == "cuda":
            # Blocks whose readers closed them late go back to the allocator only when they are collected.
            torch.cuda.ipc_collect()

    def drain(self) -> None:
        """Free every bucket and take the remaining tensors, so that the ranks that send them come to their end."""
        self.release(self._number)
        while self._next is not None:
            self._advance()

    def _advance(self) -> None:
        self._next = next(self._tensors, None)

    @torch.no_grad()
    def _filled(self) -> Bucket:
        assert self._next is not None
        flat = self._allocated(max(self._capacity, self._bytes(self._next[1])))
        slots: list[TensorSlot] = []
        begin = 0
        while self._next is not None:
            name, tensor = self._next
            end = begin + self._bytes(tensor)
            if end > len(flat):
                break
            flat[begin:end].view(self._dtype).copy_(tensor.reshape(-1))
            slots.append(TensorSlot(name, str(self._dtype).removeprefix("torch."), tuple(tensor.shape), begin, end))
            begin = end
            self._advance()
        flat = flat[:begin]
        checksum = int(weight_checksum(flat)) if self._verify else None
        if checksum is not None:
            self.checksums.append(checksum)
        elif self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return Bucket(self._number, tuple(slots), flat, self._next is None, checksum)

    def _bytes(self, tensor: torch.Tensor) -> int:
        return tensor.numel() * self._dtype.itemsize

    def _allocated(self, nbytes: int) -> torch.Tensor:
        """Return uint8 `[nbytes]`; the same size every time, so that the allocator finds the block of before."""
        if not self._shared or self._device.type == "cuda":
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        try:
            storage = torch.UntypedStorage._new_using_filename_cpu(nbytes)
        except RuntimeError as error:
            raise EngineError(
                f"a bucket of {nbytes >> 20} MiB finds no room in shared memory; lower weights.bucket_mib: {error}"
            ) from error
        return torch.empty(0, dtype=torch.uint8).set_(storage)


def handle(bucket: Bucket) -> MemoryHandle:
    """Return a handle of the bucket's memory for one reader; each reader needs its own, which it opens once.

    The memory must stay until the reader has closed it: torch counts the readers of each handle (`CUDA IPC
    refcounting` in torch/csrc/CudaIPCTypes.h; the map's own count in shared memory).
    """
    storage = bucket.flat.untyped_storage()
    if bucket.flat.is_cuda:
        _, *facts = storage._share_cuda_()
        return MemoryHandle(gpu_uuid(bucket.flat.device), tuple(facts))
    manager, name, size = storage._share_filename_cpu_()
    # The reader takes one count away when it opens the file (torch.multiprocessing.reductions).
    storage._shared_incref()
    return MemoryHandle("", (manager, name, size))


def give_up(bucket: Bucket, one: MemoryHandle) -> None:
    """Take back the count of a bucket's handle that nobody has open, or that died with the process that had it open.

    On a GPU a count that its reader has given back already does no harm: torch frees at zero and below, and uses none
    twice. On a CPU a reader must not have closed it; all handles of a bucket share one count there.
    """
    if bucket.flat.is_cuda:
        *_, counter, place, _event, _waits = one.facts
        torch.UntypedStorage._release_ipc_counter(counter, place, device=bucket.flat.device)
    else:
        bucket.flat.untyped_storage()._shared_decref()


def gpu_uuid(device: torch.device) -> str:
    """Return the UUID of a GPU as torch writes it."""
    return str(torch.cuda.get_device_properties(device).uuid)
