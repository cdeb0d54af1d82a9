"""What the routers of a microbatch did, kept until many layers can be counted together.

On a GPU a small kernel costs its launch and hardly more: layer by layer, counting was most of replay's time.
"""

from __future__ import annotations

import torch

from r3.trainer.routed import AuditPairs, MicrobatchRouting, RoutedRecord
from r3.trainer.tally import Tally

# Bytes that counting may take at once, for what is kept of the layers and for comparing them.
ROOM_BYTES = 128 * 2**20


class MicrobatchCounts:
    """Counts the first pass of one microbatch into `tally`: an `add` for each router call, then `finish`.

    Layers are counted in blocks of consecutive ones that are all forced or all free, as many as there is room for.
    """

    def __init__(self, tally: Tally, routing: MicrobatchRouting, record: RoutedRecord) -> None:
        self._tally, self._routing, self._record = tally, routing, record
        # The first layer of the block, its column, and whether it is forced.
        self._block = (0, 0, False)
        self._own: list[torch.Tensor] = []
        self._used: list[torch.Tensor] = []
        self._differs: torch.Tensor | None = None
        self._flags: dict[int, torch.Tensor] = {}

    def add(self, local: int, column: int, own: torch.Tensor, used: torch.Tensor | None) -> None:
        """Take what one router chose and used.

        `local` counts the MoE layers of this rank, `column` those of the model. `own` int64 `[t, k]`: its own choice;
        `used` bool `[t, k]`: which of the recorded ids its map has, None where it was not forced.
        """
        self._tally.visits[column] = self._tally.visits.get(column, 0) + 1
        size = self._size
        begin, first, forced = self._block
        if size and ((begin + size, first + size, forced) != (local, column, used is not None) or self._full(own)):
            self._count()
            size = 0
        if not size:
            self._block = (local, column, used is not None)
        if self._routing.compare:
            self._own.append(own)
        if used is not None:
            self._used.append(used)

    def finish(self, chunk: int) -> None:
        """Count what is left, and note that `chunk` of the model ran this microbatch."""
        self._count()
        index = self._tally.finish_microbatch(chunk, self._routing.experts is not None)
        if self._routing.experts is None or not self._routing.compare:
            return
        recorded = self._record.recorded
        # A part of the model without an MoE layer differs nowhere.
        differs = torch.zeros_like(recorded) if self._differs is None else self._differs
        self._tally.note_differences(index, differs, recorded, self._flags)

    @property
    def _size(self) -> int:
        return max(len(self._own), len(self._used))

    def _full(self, own: torch.Tensor) -> bool:
        rows, k = own.shape
        # Ids of both sides and every id with every other; where nothing is compared, the used ones twice.
        size = rows * k * (17 + k if self._routing.compare else 2)
        if self._routing.audit is not None:
            size += len(self._routing.audit.own) * k * (16 + k)
        return (self._size + 1) * size > ROOM_BYTES

    def _count(self) -> None:
        size, (begin, first, _) = self._size, self._block
        columns = slice(first, first + size)
        if self._used:
            self._count_used(columns, torch.stack(self._used).bool())
        if self._own:
            self._compare(columns, torch.stack(self._own), self._record.layers(begin, begin + size))
        self._own.clear()
        self._used.clear()

    def _count_used(self, columns: slice, used: torch.Tensor) -> None:
        """Count into `columns` which recorded ids were used, `used` bool `[layers, t, k]`."""
        self._tally.mismatched_ids.add_((~used & self._record.mask).sum())
        self._tally.followed[columns].add_((used.all(-1) & self._record.recorded).sum(-1))

    def _compare(self, columns: slice, own: torch.Tensor, ids: torch.Tensor) -> None:
        """Count into `columns` where the own choice is another than the record, each int64 `[layers, t, k]`."""
        differs = ~contained(ids, own).all(-1) & self._record.recorded
        self._tally.disagree[columns].add_(differs.sum(-1))
        anywhere = differs.any(0)
        self._differs = anywhere if self._differs is None else self._differs | anywhere
        if self._routing.trace:
            self._flags |= dict(zip(range(columns.start, columns.stop), differs.unbind(0), strict=True))
        if self._routing.audit is not None:
            self._overlap(columns, own, ids, self._routing.audit)

    def _overlap(self, columns: slice, own: torch.Tensor, ids: torch.Tensor, audit: AuditPairs) -> None:
        """Compare the own choice of the audited rows t with the record of rows t-1, t and t+1 of the same sequence."""
        tally = self._tally
        tally.overlap_pairs[columns] += audit.pairs
        tally.window_pairs += len(own) * audit.window_pairs
        hits = contained(ids.index_select(1, audit.record), own.index_select(1, audit.own)).sum(-1, dtype=torch.float64)
        tally.overlap[columns].view(len(own), -1).add_(hits @ audit.classes)
        tally.windows.index_add_(0, audit.window, hits[:, audit.lag0].sum(0))


def contained(ids: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Tell for each of `ids` `[..., k]` whether the same row of `among` `[..., k]` has it; bool `[..., k]`."""
    return (ids.unsqueeze(-1) == among.unsqueeze(-2)).any(-1)
