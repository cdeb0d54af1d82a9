"""What the routers of a microbatch did, kept until many layers can be counted together.

On a GPU a small kernel costs its launch and hardly more: layer by layer, counting was most of replay's time.
"""

from __future__ import annotations

from functools import cached_property, lru_cache

import torch

from r3.audit import LAGS
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
        self._maps: list[torch.Tensor] = []
        self._differs: torch.Tensor | None = None
        self._flags: dict[int, torch.Tensor] = {}

    def add(self, local: int, column: int, own: torch.Tensor, routing_map: torch.Tensor | None) -> None:
        """Take what one router chose and used.

        `local` counts the MoE layers of this rank, `column` those of the model. `own` int64 `[t, k]`: its own choice;
        `routing_map` bool `[t, experts]`: what its experts get, None where it was not forced.
        """
        self._tally.visits[column] = self._tally.visits.get(column, 0) + 1
        size = self._size
        begin, first, forced = self._block
        here = (local, column, routing_map is not None)
        if size and ((begin + size, first + size, forced) != here or self._full(own, routing_map)):
            self._count()
            size = 0
        if not size:
            self._block = here
        if self._routing.compare:
            self._own.append(own)
        if routing_map is not None:
            self._maps.append(routing_map)

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
        return max(len(self._own), len(self._maps))

    @cached_property
    def _audit(self) -> AuditPairs | None:
        # Made when a block is counted, which is when the device has work: before its first layers it would wait.
        return None if self._routing.audit is None else self._routing.audit()

    def _full(self, own: torch.Tensor, routing_map: torch.Tensor | None) -> bool:
        rows, k = own.shape
        # A map and its copy, and of the used ids twice.
        size = 0 if routing_map is None else 2 * rows * (routing_map.shape[1] + k)
        if self._routing.compare:
            # Ids of both sides and every id with every other.
            size += rows * k * (16 + k)
        size += len(LAGS) * self._routing.audited * k * (16 + k)
        return (self._size + 1) * size > ROOM_BYTES

    def _count(self) -> None:
        size, (begin, first, _) = self._size, self._block
        columns = slice(first, first + size)
        if size:
            ids = self._record.layers(begin, begin + size)
            if self._maps:
                self._count_used(columns, torch.stack(self._maps).gather(2, ids).bool())
            if self._own:
                self._compare(columns, torch.stack(self._own), ids)
        self._own.clear()
        self._maps.clear()

    def _count_used(self, columns: slice, used: torch.Tensor) -> None:
        """Count into `columns` which recorded ids were used, `used` bool `[layers, t, k]`."""
        self._tally.mismatched_ids.add_((~used & self._record.mask).sum())
        self._tally.followed[columns].add_((used.all(-1) & self._record.recorded).sum(-1))

    def _compare(self, columns: slice, own: torch.Tensor, ids: torch.Tensor) -> None:
        """Count into `columns` where the own choice is another than the record, each int64 `[layers, t, k]`."""
        differs = ~contained(ids, own).all(-1) & self._record.recorded
        self._tally.disagree[columns].add_(differs.sum(-1))
        recorded = self._record.mask.long().expand(ids.shape[1:]).reshape(1, -1).expand(len(ids), -1)
        self._tally.loads[columns].scatter_add_(1, ids.flatten(1), recorded)
        self._tally.repeated.add_((repeats(ids) & self._record.recorded).sum())
        anywhere = differs.any(0)
        self._differs = anywhere if self._differs is None else self._differs | anywhere
        if self._routing.trace:
            self._flags |= dict(zip(range(columns.start, columns.stop), differs.unbind(0), strict=True))
        if self._audit is not None:
            self._overlap(columns, own, ids, self._audit)

    def _overlap(self, columns: slice, own: torch.Tensor, ids: torch.Tensor, audit: AuditPairs) -> None:
        """Compare the own choice of the audited rows t with the record of rows t-1, t and t+1 of the same sequence."""
        tally = self._tally
        tally.overlap_pairs[columns] += audit.pairs
        tally.window_pairs += len(own) * audit.window_pairs
        hits = contained(ids.index_select(1, audit.record), own.index_select(1, audit.own)).sum(-1, dtype=torch.float64)
        tally.overlap[columns].view(len(own), -1).add_(hits @ audit.classes)
        tally.windows.index_add_(0, audit.window, hits[:, audit.lag0].sum(0))


def repeats(ids: torch.Tensor) -> torch.Tensor:
    """Tell which rows of `ids` `[..., k]` name an expert twice; bool `[...]`."""
    equal = ids.unsqueeze(-1) == ids.unsqueeze(-2)
    # One dimension after the other: on a CPU twice as fast as both at once.
    return equal.bitwise_and_(_earlier(ids.shape[-1], ids.device)).any(-1).any(-1)


@lru_cache
def _earlier(k: int, device: torch.device) -> torch.Tensor:
    """Return which places are before which, bool `[k, k]`."""
    return torch.ones(k, k, dtype=torch.bool, device=device).tril_(-1)


def contained(ids: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Tell for each of `ids` `[..., k]` whether the same row of `among` `[..., k]` has it; bool `[..., k]`."""
    return (ids.unsqueeze(-1) == among.unsqueeze(-2)).any(-1)
