"""Weights on their way out of the trainer: buckets of bytes for the engines, checkpoint directories for everyone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from r3.errors import CheckpointError
from r3.weights import TensorSlot, WeightBucket, WeightBuckets
from r3.weightsum import weight_checksum

# What a Hugging Face directory needs besides weights and config.json to be usable on its own.
COMPANIONS = (
    "tokenizer*",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
)
SHARD_BYTES = 4 * 2**30

NamedTensors = Iterable[tuple[str, torch.Tensor]]


def weight_buckets(
    tensors: NamedTensors, dtype: torch.dtype, bucket_bytes: int, version: int, *, verify: bool = True
) -> WeightBuckets:
    """Return the tensors, cast to `dtype`, as runs of at most `bucket_bytes`; a larger tensor has its own bucket."""
    cast = ((name, tensor.to(dtype)) for name, tensor in tensors)
    buckets = tuple(_bucket(group) for group in _groups(cast, bucket_bytes))
    checksums = tuple(int(weight_checksum(torch.from_numpy(bucket.data))) for bucket in buckets) if verify else ()
    return WeightBuckets(version, buckets, checksums)


def save_checkpoint(tensors: NamedTensors, source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write a Hugging Face checkpoint directory; config, tokenizer and generation config come from `source`.

    The directory appears under its name only when it is complete. Raises `CheckpointError` when it cannot be written.
    """
    staging = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        _write_weights(tensors, staging, dtype)
        for pattern in COMPANIONS:
            for file in source.glob(pattern):
                shutil.copy2(file, staging / file.name)
        config = json.loads((source / "config.json").read_text())
        # Transformers 5 calls it `dtype`, earlier versions `torch_dtype`.
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _swap(staging, target)
    except OSError as error:
        raise CheckpointError(f"the checkpoint {target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_weights(tensors: NamedTensors, directory: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    parts: list[list[str]] = []
    total = 0
    # On the host at once: a shard is much larger than the batches in which tensors come from other ranks.
    for group in _groups(((name, tensor.to(dtype).cpu()) for name, tensor in tensors), SHARD_BYTES):
        shard = {name: tensor.contiguous() for name, tensor in group}
        total += sum(tensor.nbytes for tensor in shard.values())
        save_file(shard, directory / f"{len(parts)}.safetensors", metadata={"format": "pt"})
        parts.append(list(shard))
    if len(parts) == 1:
        (directory / "0.safetensors").rename(directory / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    for i, file in enumerate(names):
        (directory / f"{i}.safetensors").rename(directory / file)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, held in zip(names, parts, strict=True) for name in held},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _swap(staging: Path, target: Path) -> None:
    """Put `staging` in the place of `target`; a directory cannot be renamed over one that holds files."""
    if not target.exists():
        staging.rename(target)
        return
    previous = target.with_name(f".{target.name}.{os.getpid()}.old")
    target.rename(previous)
    staging.rename(target)
    shutil.rmtree(previous)


def _groups(tensors: NamedTensors, limit: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    group: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if group and size + tensor.nbytes > limit:
            yield group
            group, size = [], 0
        group.append((name, tensor))
        size += tensor.nbytes
    if group:
        yield group


def _bucket(group: list[tuple[str, torch.Tensor]]) -> WeightBucket:
    data = np.empty(sum(tensor.nbytes for _, tensor in group), np.uint8)
    slots, begin = [], 0
    for name, tensor in group:
        end = begin + tensor.nbytes
        torch.from_numpy(data[begin:end]).copy_(tensor.contiguous().reshape(-1).view(torch.uint8))
        slots.append(TensorSlot(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), begin, end))
        begin = end
    return WeightBucket(tuple(slots), data)
