"""Rotary embeddings of packed sequences without a look at the host, their angles made once for all layers.

Megatron-core asks the device for every sequence's length, in every layer, for queries and for keys, (0.19) rotates one
sequence at a time, and makes cosines and sines each time (`_apply_rotary_pos_emb_thd` and `_bshd` in rope_utils.py,
0.16.1 and 0.19.2). On a GPU each look waits for all work before it, and each small kernel costs its launch. The same
angles are picked here by an index that is made on the device, for all sequences at once, and kept with the microbatch.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from r3.errors import ConfigError

_UTILS = "megatron.core.models.common.embeddings.rope_utils"


@dataclass(frozen=True, slots=True, eq=False)
class _Turn:
    """Cosines and sines `[t, 1, d]` of a microbatch's rows, and what they were made of."""

    freqs: torch.Tensor
    mscale: float
    cos: torch.Tensor
    sin: torch.Tensor

    def fits(self, t: torch.Tensor, freqs: torch.Tensor, mscale: float) -> bool:
        # Recomputation hands on other tensors over the same memory, which `self.freqs` keeps from being used again.
        same = self.freqs.data_ptr() == freqs.data_ptr() and self.freqs.shape == freqs.shape
        return same and (len(self.cos), self.cos.dtype, self.mscale) == (len(t), t.dtype, mscale)


# By the tensor that says where a microbatch's sequences begin, with which they go.
_turns = WeakTensorKeyDictionary()


def install() -> None:
    """Put `rotate_packed` in the place of Megatron-core's function, on any device. Idempotent."""
    utils = importlib.import_module(_UTILS)
    utils._apply_rotary_pos_emb_thd = rotate_packed  # type: ignore[attr-defined]


def rotate_packed(
    t: torch.Tensor,
    cu_seqlens: torch.Tensor,
    freqs: torch.Tensor,
    *,
    mscale: float = 1.0,
    cp_group: Any = None,
    **kinds: bool,
) -> torch.Tensor:
    """Rotate `t` `[t, heads, d]` by the angles `freqs` `[longest, 1, 1, d]` of each row's place in its own sequence.

    `cu_seqlens` integers `[sequences + 1]`: where the sequences begin, over all context-parallel ranks; a rank of
    `cp_group` has the zigzag chunks `rank` and `2 * size - 1 - rank` of each. Raises `ConfigError` for another one of
    Megatron-core's `kinds` of rotation (interleaved, latent), or a partial one; no model of the trainer has any.
    """
    asked = [name for name, is_set in kinds.items() if is_set]
    if asked or freqs.shape[-1] != t.shape[-1]:
        raise ConfigError(
            f"packed sequences are rotated by halves of whole heads ({t.shape[-1]}), not {freqs.shape[-1]} wide "
            f"{asked}; set trainer.packed: false"
        )
    turn = _turns.get(cu_seqlens)
    if turn is None or not turn.fits(t, freqs, mscale):
        turn = _turns[cu_seqlens] = _turn(t, cu_seqlens, freqs, mscale, cp_group)
    first, second = t.chunk(2, -1)
    return t * turn.cos + torch.cat((-second, first), -1) * turn.sin


def _turn(t: torch.Tensor, cu_seqlens: torch.Tensor, freqs: torch.Tensor, mscale: float, cp_group: Any) -> _Turn:
    angles = freqs[positions(len(t), cu_seqlens, cp_group.rank(), cp_group.size())].squeeze(1)
    cos, sin = ((part * mscale).to(t.dtype) for part in (angles.cos(), angles.sin()))
    return _Turn(freqs, mscale, cos, sin)


def positions(rows: int, cu_seqlens: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Return the position of each of a context rank's `rows` in its own sequence, int `[rows]`."""
    bounds = cu_seqlens // size
    row = torch.arange(rows, dtype=bounds.dtype, device=bounds.device)
    sequence = torch.searchsorted(bounds[1:].contiguous(), row, right=True)
    inside = row - bounds[sequence]
    if size == 1:
        return inside
    chunk = (bounds[sequence + 1] - bounds[sequence]) // 2
    return torch.where(inside < chunk, rank * chunk + inside, (2 * size - 2 - rank) * chunk + inside)
