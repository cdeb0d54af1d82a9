"""Weights as a checkpoint directory, for an engine that takes them from disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from r3.errors import EngineError
from r3.types import WeightBucket, WeightBuckets, WeightSource


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
    from safetensors import serialize_file

    shutil.copyfile(model_dir / "config.json", directory / "config.json")
    total = len(weights.buckets)
    for number, bucket in enumerate(weights.buckets, start=1):
        serialize_file(_tensors(bucket), str(directory / f"model-{number:05d}-of-{total:05d}.safetensors"))


def _tensors(bucket: WeightBucket) -> dict[str, dict[str, object]]:
    data = bucket.data
    return {
        slot.name: {"dtype": slot.dtype, "shape": list(slot.shape), "data": data[slot.begin : slot.end].tobytes()}
        for slot in bucket.slots
    }
