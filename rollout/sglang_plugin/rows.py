"""Routing rows as the plugin keeps them: narrowed on the device, one compact row per KV slot in ordinary host memory.

SGLang keeps int32 rows in pinned memory. Here an id takes one byte (two above 256 experts), and the memory is not
pinned: the device copies each pass into SGLang's own pinned staging buffers, and the host moves the rows on from there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from r3.routing import expert_dtype

# Behind the rows of a pass lie the smallest and the largest id that they had as int32.
_EXTREMES = 8
_ALIGN = 16

Ids = NDArray[np.unsignedinteger[Any]]
SlotIds = NDArray[np.integer[Any]]


class RowStore:
    """One row `[layers * k]` per KV slot, uint8 for at most 256 experts, else uint16.

    Narrowing turns -1 into 255 without a word, so a pass with an id outside `[0, num_experts)` marks its slots, until
    another pass writes them; such rows are never handed out as if they were sound.
    """

    def __init__(self, slots: int, layers: int, k: int, num_experts: int) -> None:
        self.shape = (layers, k)
        self.num_experts = num_experts
        self.rows: Ids = np.empty((slots, layers * k), expert_dtype(num_experts))
        self.rows.fill(0)  # takes the memory now, and not page by page while passes wait
        self._items = self.rows.view(np.dtype((np.void, self.row_bytes)))[:, 0]
        self._unsound: NDArray[np.bool_] | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return int(self.rows.shape[1] * self.rows.itemsize)

    @property
    def dtype(self) -> str:
        """Name of the ids' numpy dtype."""
        return self.rows.dtype.name

    def put(self, slots: SlotIds, flat: NDArray[np.uint8]) -> None:
        """Write the rows of `slots` `[tokens]`; `flat` is what `narrowed` returned, on the host."""
        size = len(slots) * self.row_bytes
        self._items[slots] = flat[:size].view(self._items.dtype)
        low, high = flat[_padded(size) :].view(np.int32)
        sound = not len(slots) or (low >= 0 and high < self.num_experts)
        if not sound and self._unsound is None:
            self._unsound = np.zeros(len(self.rows), dtype=np.bool_)
        if self._unsound is not None:
            self._unsound[slots] = not sound

    def take(self, slots: SlotIds, out: NDArray[np.uint8]) -> int:
        """Copy the rows of `slots` `[rows]` into `out`, uint8 `[rows * row_bytes]`; return how many are not sound."""
        if len(slots):
            if not 0 <= int(slots.min()) <= int(slots.max()) < len(self.rows):
                raise IndexError(f"KV slots {int(slots.min())} to {int(slots.max())} of {len(self.rows)}")
            # Any other mode copies twice.
            np.take(self.rows, slots, axis=0, out=out.view(self.rows.dtype).reshape(len(slots), -1), mode="clip")
        return int(self._unsound[slots].sum()) if self._unsound is not None else 0

    def stock(self, slots: SlotIds) -> NDArray[np.int32]:
        """Return rows `[rows, layers, k]` as SGLang itself keeps them; -1 in those that are not sound."""
        rows = self.compact(slots).astype(np.int32)
        if self._unsound is not None:
            rows[self._unsound[slots]] = -1
        return rows

    def compact(self, slots: SlotIds) -> Ids:
        """Return rows `[rows, layers, k]` in the dtype of the record."""
        out = np.empty(len(slots) * self.row_bytes, np.uint8)
        self.take(slots, out)
        found: Ids = out.view(self.rows.dtype).reshape(len(slots), *self.shape)
        return found

    def is_sound(self, slots: SlotIds) -> bool:
        """Did every row's ids fit the model when they were still wide?"""
        return self._unsound is None or not self._unsound[slots].any()


def narrowed(wide: Any, num_experts: int) -> Any:
    """Return a torch tensor of int32 ids `[tokens, layers, k]` as bytes on its device: the narrow rows, padding, and
    the smallest and the largest id, so that one copy takes both to the host.

    Two kernels on the stream of the pass; the result is a copy, which the next pass cannot overwrite.
    """
    import torch

    item = expert_dtype(num_experts).itemsize
    size = wide.numel() * item
    flat = torch.empty(_padded(size) + _EXTREMES, dtype=torch.uint8, device=wide.device)
    # int16 holds the same bits as uint16, for which torch has few kernels.
    flat[:size].view(torch.uint8 if item == 1 else torch.int16).view(wide.shape).copy_(wide)
    if wide.numel():
        extremes = flat[_padded(size) :].view(torch.int32)
        torch.aminmax(wide, out=(extremes[0], extremes[1]))
    return flat


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
