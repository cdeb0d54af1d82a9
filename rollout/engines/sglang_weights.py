"""How new weights get into an in-process SGLang engine, whatever way they come."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from r3.errors import EngineError
from r3.rollout.sglang_plugin.client import Verifier
from r3.types import ModelSpec, WeightVersion
from r3.weights import BroadcastGroup, MemoryHandle, TensorSlot, WeightBucket, WeightPart, WeightSource


class WeightLoader:
    """Replaces the weights of one engine; emptying its cache afterwards, and what its answers mean until then, is the
    adapter's. `ranks`: its tensor-parallel ranks. Every method raises `EngineError` with the engine's own message.
    """

    def __init__(self, engine: Any, name: str, model: ModelSpec, ranks: int, *, verify: bool) -> None:
        self._engine, self._name, self._model, self._ranks = engine, name, model, ranks
        self._verifier = Verifier(engine, wanted=verify)
        self._version: WeightVersion | None = None
        self._session = False

    @property
    def unverified(self) -> str:
        """Why received bytes are not verified; empty when they are."""
        return self._verifier.absent

    def load(self, source: WeightSource, version: WeightVersion) -> None:
        """Load a whole set from buckets in host memory, or from a checkpoint directory."""
        if isinstance(source, Path):
            self._load_directory(source, version)
            return
        with self._update_session(version):
            for number, bucket in enumerate(source.buckets):
                self._load_bucket(bucket, last=number == len(source.buckets) - 1)
        self._verifier.compare(source.checksums, version, self._name)

    def begin(self, version: WeightVersion) -> None:
        """Begin an update that comes part by part; one that was left half-way is given up."""
        self._end_session()
        self._begin_session(version)

    def load_part(self, part: WeightPart) -> None:
        """Load one bucket from another process's memory or from the broadcast group; returns when every rank has it."""
        if self._version is None:
            raise EngineError(f"{self._name}: bucket {part.number} came outside a weight update")
        version = self._version if part.last else None
        if part.handles:
            if len(part.handles) != self._ranks:
                raise EngineError(f"{self._name}: {len(part.handles)} handles for {self._ranks} ranks")
            slots = metadata(part.slots)
            payloads = [_payload(_Handle(one, part.nbytes), slots) for one in part.handles]
            self._update_from_tensor(payloads, version)
        else:
            self._receive(part, version)

    def end(self, checksums: Sequence[int]) -> None:
        """End an update: `checksums` are those of every bucket that was sent, none to skip the comparison."""
        version = self._version
        self._end_session()
        if version is None:
            raise EngineError(f"{self._name}: no weight update was begun")
        self._version = None
        self._verifier.compare(checksums, version, self._name)

    def join(self, group: BroadcastGroup, offset: int) -> None:
        """Join a broadcast group with every rank, from rank `offset` on; blocks until all have come."""
        outcome = self._engine.init_weights_update_group(
            group.host, group.port, offset, group.world, group.name, group.backend
        )
        self._require_success("init_weights_update_group", outcome)

    def leave(self, name: str) -> None:
        """Leave a broadcast group."""
        self._require_success("destroy_weights_update_group", self._engine.destroy_weights_update_group(name))

    @contextmanager
    def _update_session(self, version: WeightVersion) -> Iterator[None]:
        """Hold SGLang's weight-update session open, on releases that have one (0.5.23 requires it, 0.5.17 has none)."""
        self._begin_session(version)
        try:
            yield
        finally:
            self._end_session()
            self._version = None

    def _begin_session(self, version: WeightVersion) -> None:
        self._verifier.start()
        if hasattr(self._engine, "begin_weight_update"):
            self._require_success("begin_weight_update", self._engine.begin_weight_update())
            self._session = True
        self._version = version

    def _end_session(self) -> None:
        if self._session:
            self._session = False
            self._require_success("end_weight_update", self._engine.end_weight_update())

    def _load_bucket(self, bucket: WeightBucket, *, last: bool) -> None:
        import torch

        with warnings.catch_warnings():
            # The array is a read-only view of the object store; SGLang only reads it.
            warnings.filterwarnings("ignore", message=".*not writable.*", category=UserWarning)
            flat = torch.from_numpy(bucket.data)
        slots = metadata(bucket.slots)
        # Each payload carries handles of shared memory that one reader may take.
        payloads = [_payload(flat, slots) for _ in range(self._ranks)]
        self._update_from_tensor(payloads, self._version if last else None)

    def _update_from_tensor(self, payloads: list[bytes], version: WeightVersion | None) -> None:
        """Hand one bucket to every tensor-parallel rank; the engine takes `version` as its own where it is not None."""
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput

        # `Engine.update_weights_from_tensor` has no weight_version, its request object does.
        request = UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=payloads,
            load_format="flattened_bucket",
            flush_cache=False,
            weight_version=None if version is None else str(version),
        )
        self._request("update_weights_from_tensor", request)

    def _receive(self, part: WeightPart, version: WeightVersion | None) -> None:
        from sglang.srt.managers.io_struct import UpdateWeightsFromDistributedReqInput

        request = UpdateWeightsFromDistributedReqInput(
            names=[slot.name for slot in part.slots],
            dtypes=[slot.dtype for slot in part.slots],
            shapes=[list(slot.shape) for slot in part.slots],
            group_name=part.group,
            load_format="flattened_bucket",
            flush_cache=False,
            weight_version=None if version is None else str(version),
        )
        self._request("update_weights_from_distributed", request)

    def _load_directory(self, directory: Path, version: WeightVersion) -> None:
        from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

        ModelSpec.from_directory(directory).require_same(self._model, str(directory), "the engine")
        request = UpdateWeightFromDiskReqInput(
            model_path=str(directory), flush_cache=False, weight_version=str(version)
        )
        self._request("update_weights_from_disk", request)

    def _request(self, call: str, request: Any) -> None:
        manager = self._engine.tokenizer_manager
        self._require_success(call, self._engine.loop.run_until_complete(getattr(manager, call)(request, None)))

    def _require_success(self, call: str, outcome: Any) -> None:
        """SGLang's control calls return (success, message, ...) and do not raise."""
        success, message = (
            (outcome[0], outcome[1]) if isinstance(outcome, tuple | list) else (outcome.success, outcome.message)
        )
        if not success:
            raise EngineError(f"{self._name} {call} failed: {message}")


def metadata(slots: Sequence[TensorSlot]) -> list[Any]:
    """Return the slots as SGLang's `FlattenedTensorMetadata`; raise `EngineError` for one that is not aligned."""
    import torch
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorMetadata

    found = []
    for slot in slots:
        dtype = getattr(torch, slot.dtype)
        if slot.begin % dtype.itemsize:
            raise EngineError(f"weight {slot.name} begins at byte {slot.begin}, not a multiple of {dtype.itemsize}")
        shape = torch.Size(slot.shape)
        found.append(FlattenedTensorMetadata(slot.name, shape, dtype, slot.begin, slot.end, slot.end - slot.begin))
    return found


def _payload(flat: Any, slots: list[Any]) -> bytes:
    """Return what one rank unpickles, as SGLang's `MultiprocessingSerializer` writes it."""
    from multiprocessing.reduction import ForkingPickler

    buffer = io.BytesIO()
    ForkingPickler(buffer, pickle.HIGHEST_PROTOCOL).dump({"flattened_tensor": flat, "metadata": slots})
    return buffer.getvalue()


class _Call:
    """Pickles as a call of `function`, which the reader makes."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._called = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._called


class _Handle:
    """Pickles as the uint8 tensor `[nbytes]` behind a handle, as torch's reductions would in the process that owns it.

    This process opens nothing: a tensor that came from another process cannot be passed on, and on a GPU it would cost
    a CUDA context.
    """

    def __init__(self, handle: MemoryHandle, nbytes: int) -> None:
        self._handle, self._nbytes = handle, nbytes

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        import torch
        from torch.multiprocessing import reductions

        shape, stride, facts = torch.Size([self._nbytes]), (1,), self._handle.facts
        if not self._handle.gpu:
            storage = _Call(reductions.rebuild_storage_filename, torch.UntypedStorage, *facts)
            typed = _Call(reductions.rebuild_typed_storage, storage, torch.uint8)
            return reductions.rebuild_tensor, (torch.Tensor, typed, (0, shape, stride, False))
        memory, size, offset, counter, counter_offset, event, waits = facts
        # SGLang's readers take the UUID in the place of torch's device number (`sglang.srt.utils.patch_torch`).
        return reductions.rebuild_cuda_tensor, (
            torch.Tensor, shape, stride, 0, torch.storage.TypedStorage, torch.uint8,
            self._handle.gpu, memory, size, offset, False, counter, counter_offset, event, waits,
        )  # fmt: skip
