"""How the sequences of a packed microbatch are attended to: as few padded batches, planned once on the host.

One call of the attention kernel for many sequences of similar length beats one call each, which costs a launch (and, on
a CPU, a thread barrier) per sequence and layer. The plan travels with Megatron's `PackedSeqParams`, so that no layer
asks the device for lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from r3.trainer.megatron import PackedSeqParams
from r3.trainer.parallel import upload

# Sequences are attended as one padded batch while that costs at most this many times their own rows.
PADDING_LIMIT = 2


@dataclass
class Packing(PackedSeqParams):  # type: ignore[misc]  # untyped base
    """Megatron's description of packed sequences, and the plan of their attention.

    `lengths`: of every sequence, over all context-parallel ranks. `batches`: int64 `[s, b]` each, the packed rows of
    one padded batch; `back` int64 `[t]`: the place of every packed row in the batches' rows, end to end.
    """

    lengths: tuple[int, ...] = ()
    batches: tuple[torch.Tensor, ...] = ()
    back: torch.Tensor | None = None

    @classmethod
    def of(cls, lengths: Sequence[int], where: torch.device) -> Packing:
        """Return the description of sequences of `lengths`, end to end, on a device."""
        bounds = upload(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), where)
        longest = max(lengths)
        batches, back = plan_batches(lengths)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            lengths=tuple(lengths),
            batches=tuple(upload(batch, where) for batch in batches),
            back=upload(back, where),
        )


def plan_batches(lengths: Sequence[int]) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    """Return the batches and the way back; see `Packing`.

    The longest sequences come first, each batch as many as `PADDING_LIMIT` allows, so their number grows with the
    logarithm of longest / shortest. A pad repeats the last row of its sequence, right of every row that is read back.
    """
    sizes = np.asarray(lengths, np.int64)
    begins = np.cumsum(sizes) - sizes
    back = np.empty(int(sizes.sum()), np.int64)
    batches, offset = [], 0
    for members in _alike(sizes):
        steps = np.arange(sizes[members].max())
        batches.append(begins[members] + np.minimum(steps[:, None], sizes[members] - 1))
        for column, member in enumerate(members):
            rows = np.arange(sizes[member])
            back[begins[member] + rows] = offset + rows * len(members) + column
        offset += batches[-1].size
    return batches, back


def _alike(sizes: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Sort the sequences into batches; each in the order in which they are packed."""
    if len(sizes) * sizes.max() <= PADDING_LIMIT * sizes.sum():
        return [np.arange(len(sizes))]
    order = np.argsort(-sizes, kind="stable")
    groups, first = [], 0
    for end in range(1, len(order) + 1):
        if (
            end == len(order)
            or (end + 1 - first) * sizes[order[first]] > PADDING_LIMIT * sizes[order[first : end + 1]].sum()
        ):
            groups.append(np.sort(order[first:end]))
            first = end
    return groups
