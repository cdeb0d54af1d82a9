"""A checksum of a bucket of weights, computed where its bytes are, alike in the trainer and in the engine."""

from __future__ import annotations

import torch

# Words at once: bounds the temporary int64 copy to 32 MiB.
_CHUNK = 1 << 22
# Knuth's multiplier for 64 bits; odd, so that no chunk's sum is lost.
_FACTOR = 6364136223846793005


def weight_checksum(flat: torch.Tensor) -> torch.Tensor:
    """Return a checksum of bytes `[n]` uint8 as an int64 scalar on their device, without waiting for it.

    Exact integers modulo 2**64, so the same on every device: words of four bytes times their position (from 1) are
    summed in chunks, and the chunks' sums joined by Horner's rule, beginning with n. A moved word, a changed one and
    zeros cut off at the end change it; it is no defence against intent.
    """
    total = torch.full((), flat.numel(), dtype=torch.int64, device=flat.device)
    whole = flat.numel() // 4 * 4
    # A view needs an aligned begin, which a bucket of its own storage has.
    words = flat[:whole].view(torch.int32)
    positions = torch.arange(1, min(_CHUNK, max(len(words), 4)) + 1, dtype=torch.int64, device=flat.device)
    for begin in range(0, len(words), _CHUNK):
        chunk = words[begin : begin + _CHUNK]
        total = total * _FACTOR + (chunk * positions[: len(chunk)]).sum()
    rest = flat[whole:]
    return total * _FACTOR + (rest * positions[: len(rest)]).sum()
