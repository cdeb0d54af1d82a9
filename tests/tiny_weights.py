"""A checkpoint file for tests that never run the model: right header, right size, zeros, no torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path


def write_weights(directory: Path, shapes: dict[str, list[int]] | None = None) -> Path:
    """Write `model.safetensors` of bf16 zeros and return the directory."""
    shapes = shapes or {"model.embed_tokens.weight": [320, 128], "lm_head.weight": [320, 128]}
    header, begin = {}, 0
    for name, shape in shapes.items():
        end = begin + 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(begin))
    return directory
