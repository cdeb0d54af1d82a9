"""What crosses a process seam when weights go from the trainer to the engines, by way of Ray or past it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from r3.errors import ConfigError
from r3.types import WeightVersion

Transport = Literal["object_store", "ipc", "broadcast"]
Wanted = Literal["auto", "object_store", "ipc", "broadcast"]
STREAMED: tuple[Transport, ...] = ("ipc", "broadcast")
# What SGLang sets in its processes (`entrypoints/engine.py`, 0.5.17 and 0.5.23) unless the environment says otherwise.
# NCCL makes a communicator only of ranks that agree on it, and reads it at a process's first.
NCCL_ENVIRONMENT = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
# Of trainer rank 0. Where torch's watchdog sees a group's peer go, the monitor of the process's first group ends the
# process eight minutes later, unless it is not to listen (`ProcessGroupNCCL::HeartbeatMonitor`, torch 2.11).
SENDER_ENVIRONMENT = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}


class TensorSlot(NamedTuple):
    """Where one tensor lies in a bucket: Hugging Face name, torch dtype name, shape, byte range `[begin, end)`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class WeightBucket:
    """Some tensors of a model as one run of bytes `[nbytes]` uint8 (bf16 has no numpy dtype, so bytes travel)."""

    slots: tuple[TensorSlot, ...]
    data: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class WeightBuckets:
    """A full set of weights under Hugging Face names, cut into buckets; the `WeightSource` of one host.

    `checksums`: `r3.weightsum.weight_checksum` of each bucket, none where they are not to be verified.
    """

    version: WeightVersion
    buckets: tuple[WeightBucket, ...]
    checksums: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all buckets."""
        return sum(bucket.data.nbytes for bucket in self.buckets)


WeightSource = WeightBuckets | Path


@dataclass(frozen=True, slots=True)
class Site:
    """Where a process stands: Ray's id of its node, and the UUIDs of the GPUs that it sees, none on a CPU."""

    node: str
    gpus: tuple[str, ...] = ()

    def shares_device(self, other: Site) -> bool:
        """Tell whether the two reach one device: a GPU by its UUID or, both without a GPU, the memory of one host."""
        if self.gpus or other.gpus:
            return bool(set(self.gpus) & set(other.gpus))
        return self.node == other.node


@dataclass(frozen=True, slots=True)
class MemoryHandle:
    """How one other process opens a bucket's memory, once; what torch's reductions say of a storage.

    `gpu`: UUID of the GPU that holds it, empty for shared memory of a host. `facts`: arguments of torch's
    `UntypedStorage._new_shared_cuda` behind the device, or of `_new_shared_filename_cpu`.
    """

    gpu: str
    facts: tuple[bytes | int | bool, ...]


@dataclass(frozen=True, slots=True)
class BroadcastGroup:
    """The process group in which trainer rank 0, as rank 0, sends to engine ranks; `host:port` is its rendezvous."""

    name: str
    host: str
    port: int
    world: int
    backend: Literal["nccl", "gloo"]


@dataclass(frozen=True, slots=True)
class WeightPart:
    """One flattened bucket on its way: what lies where in its `nbytes`, and how to get at it.

    `handles`: one for each tensor-parallel rank of the engine; without any, the bucket comes by the broadcast group
    `group`. `last`: nothing of this version follows.
    """

    number: int
    last: bool
    slots: tuple[TensorSlot, ...]
    nbytes: int
    handles: tuple[MemoryHandle, ...] = ()
    group: str = ""


@dataclass(frozen=True, slots=True)
class SentWeights:
    """What the trainer says of a finished stream: checksum of each bucket (none without `weights.verify`), bytes of
    all, seconds of gathering and filling, seconds of sending, and the most bytes that its buckets, with the batches of
    other ranks' shards, held at once.
    """

    version: WeightVersion
    checksums: tuple[int, ...]
    nbytes: int
    gather_s: float
    send_s: float
    extra_bytes: int


def choose(wanted: Wanted, trainer: Site, engines: Sequence[Site]) -> tuple[tuple[Transport, ...], str]:
    """Return the transport to each engine, and the reason in words.

    `trainer` is rank 0's site, with its own GPU alone. Raises `ConfigError` where `wanted` cannot be had.
    """
    shares = [trainer.shares_device(engine) for engine in engines]
    mixed = [worker for worker, engine in enumerate(engines) if bool(engine.gpus) != bool(trainer.gpus)]
    apart = [gpu for engine, shared in zip(engines, shares, strict=True) if not shared for gpu in engine.gpus]
    crowded = len(apart) > len(set(apart))
    if wanted == "object_store":
        return everywhere(wanted, len(engines)), "weights.transport asks for it"
    if wanted == "auto":
        if not trainer.gpus or mixed:
            return everywhere("object_store", len(engines)), "the trainer or an engine has no GPU"
        if crowded:
            return everywhere("object_store", len(engines)), "engines share a GPU, which NCCL takes once"
        ways: list[Transport] = ["ipc" if shared else "broadcast" for shared in shares]
        return (
            tuple(ways),
            f"trainer rank 0 is on GPU {trainer.gpus[0]}, which {sum(shares)} of {len(engines)} engines share",
        )
    if mixed:
        raise ConfigError(
            f"weights.transport={wanted}, but rollout worker {mixed[0]} and trainer rank 0 are not both on a GPU or "
            "both on a CPU; use auto or object_store"
        )
    if wanted == "ipc" and not all(shares):
        raise ConfigError(
            f"weights.transport=ipc, but rollout worker {shares.index(False)} does not share "
            f"{'GPU ' + trainer.gpus[0] if trainer.gpus else 'the host'} with trainer rank 0; use auto or broadcast"
        )
    if wanted == "broadcast" and trainer.gpus and any(shares):
        raise ConfigError(
            f"weights.transport=broadcast, but rollout worker {shares.index(True)} shares GPU {trainer.gpus[0]} with "
            "trainer rank 0, and NCCL takes a GPU once; use auto or ipc"
        )
    if wanted == "broadcast" and crowded:
        raise ConfigError(
            "weights.transport=broadcast, but engines share a GPU with each other, and NCCL takes a GPU once; use auto "
            "or object_store, or rollout.gpus_per_worker=1"
        )
    return everywhere(wanted, len(engines)), "weights.transport asks for it"


def everywhere(way: Transport, engines: int) -> tuple[Transport, ...]:
    """Return the same way for every engine."""
    return (way,) * engines
