"""The engine ranks' side of the check of received weights: a checksum of every flattened bucket, before it is loaded.

SGLang makes tensors of a bucket in one place, `FlattenedTensorBucket.reconstruct_tensors`, whether its bytes came
pickled, by a handle or by a broadcast. The sums stay on the device until the update is over, so that nothing waits for
them, and are compared there, in one call for all buckets. SGLang's own weight checker compares the loaded parameters of
two engines; the trainer has no such thing, its parameters are laid out otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

RECONSTRUCT = "sglang.srt.weight_sync.tensor_bucket.FlattenedTensorBucket.reconstruct_tensors"
# What a comparison that found a difference begins with, so that no other failure is taken for one.
CHANGED = "weights arrived changed: "


class Received:
    """Checksums of the buckets that this rank has received since `start`."""

    def __init__(self) -> None:
        self._sums: list[Any] = []
        self._on = False

    def reconstruct(self, original: Callable[..., Any], bucket: Any) -> Any:
        """Note the bucket's checksum, on its device."""
        if self._on:
            from r3.weightsum import weight_checksum

            self._sums.append(weight_checksum(bucket.flattened_tensor))
        return original(bucket)

    def start(self) -> None:
        """Forget what came before."""
        self._sums, self._on = [], True

    def check(self, scheduler: Any, expected: Sequence[int], version: int) -> None:
        """Compare with what the trainer sent; every rank raises the first difference that any of them found."""
        found, self._on = [int(one) for one in self._sums], False
        self._sums = []
        fault = difference(found, expected, version)
        faults = _gathered(scheduler, fault)
        for rank, text in enumerate(faults):
            if text:
                raise RuntimeError(f"{CHANGED}{text}, tensor-parallel rank {rank}")


def difference(found: Sequence[int], expected: Sequence[int], version: int) -> str:
    """Return what differs, empty when nothing does."""
    if len(found) != len(expected):
        return f"{len(found)} of {len(expected)} buckets of version {version} arrived"
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one != other:
            return f"bucket {number} of {len(expected)} of version {version} has checksum {one:#x}, {other:#x} was sent"
    return ""


def _gathered(scheduler: Any, fault: str) -> list[str]:
    """Return the findings of all tensor-parallel ranks: SGLang reports those of the first alone."""
    import torch.distributed as dist

    group = scheduler.tp_group.cpu_group
    size = dist.get_world_size(group)
    if size == 1:
        return [fault]
    faults: list[Any] = [None] * size
    dist.all_gather_object(faults, fault, group=group)
    return faults
