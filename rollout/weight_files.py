"""Weights as a checkpoint directory, for an engine that takes them from disk."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from r3.errors import EngineError
from r3.weights import WeightBucket, WeightBuckets, WeightSource


@contextmanager
def exchanged(source: WeightSource, model_dir: Path, shared: Path | None) -> Iterator[Path]:
    """Yield a directory that holds `source`: itself, or buckets written below `shared` until the block ends.

    `shared` None takes the temporary directory, which processes of one host see. Raises `EngineError`.
    """
    if isinstance(source, Path):
        yield source
        return
    if shared is not None and not shared.is_dir():
        raise EngineError(
            f"weights.exchange_dir={shared} is no directory; name one on a file system that servers share"
        )
    directory = Path(tempfile.mkdtemp(prefix=f"r3-weights-{source.version}-", dir=shared))
    try:
        directory.chmod(0o755)  # a server may run as another user
        write_checkpoint(source, model_dir, directory)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def write_checkpoint(weights: WeightBuckets, model_dir: Path, directory: Path) -> None:
    """Write every bucket as one safetensors file, beside the `config.json` of `model_dir`. Bytes are not converted."""
    from safetensors.torch import save_file

    shutil.copyfile(model_dir / "config.json", directory / "config.json")
    total = len(weights.buckets)
    for number, bucket in enumerate(weights.buckets, start=1):
        file = directory / f"model-{number:05d}-of-{total:05d}.safetensors"
        save_file(_tensors(bucket), file, metadata={"format": "pt"})


def _tensors(bucket: WeightBucket) -> dict[str, Any]:
    """Return the bucket's tensors by name, as views of its bytes."""
    import torch

    with warnings.catch_warnings():
        # The array is a read-only view of the object store; it is only read.
        warnings.filterwarnings("ignore", message=".*not writable.*", category=UserWarning)
        return {
            slot.name: torch.from_numpy(bucket.data[slot.begin : slot.end])
            .view(getattr(torch, slot.dtype))
            .reshape(slot.shape)
            for slot in bucket.slots
        }
