"""Rotary embeddings of packed sequences without a look at the host.

Megatron-core asks the device for every sequence's length, in every layer, for queries and for keys, and (0.19) rotates
one sequence at a time (`_apply_rotary_pos_emb_thd` in rope_utils.py, 0.16.1 and 0.19.2). On a GPU each look waits for
all work before it. The same angles are picked here by an index that is made on the device, for all sequences at once.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

_UTILS = "megatron.core.models.common.embeddings.rope_utils"


def install() -> None:
    """Put `rotate_packed` in the place of Megatron-core's function, on any device. Idempotent."""
    utils = importlib.import_module(_UTILS)
    utils._apply_rotary_pos_emb_thd = rotate_packed  # type: ignore[attr-defined]


def rotate_packed(
    t: torch.Tensor, cu_seqlens: torch.Tensor, freqs: torch.Tensor, *args: Any, cp_group: Any = None, **kwargs: Any
) -> torch.Tensor:
    """Rotate `t` `[t, heads, d]` by the angles `freqs` `[longest, 1, 1, d]` of each row's place in its own sequence.

    `cu_seqlens` integers `[sequences + 1]`: where the sequences begin, over all context-parallel ranks; a rank of
    `cp_group` has the zigzag chunks `rank` and `2 * size - 1 - rank` of each.
    """
    utils = importlib.import_module(_UTILS)
    picked = freqs[positions(len(t), cu_seqlens, cp_group.rank(), cp_group.size())]
    rotated: torch.Tensor = utils._apply_rotary_pos_emb_bshd(t.unsqueeze(1), picked, *args, **kwargs)
    return rotated.squeeze(1)


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
