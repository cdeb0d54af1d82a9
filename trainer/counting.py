"""What the routers of a pass did, kept until many layers and microbatches can be counted together.

On a GPU a small kernel costs its launch and hardly more, and a pass over small microbatches is as long as its launches
take: layer by layer, counting was most of replay's time, microbatch by microbatch a third.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate

import torch

from r3.audit import LAGS
from r3.trainer.routed import AuditPairs, MicrobatchRouting, RoutedRecord
from r3.trainer.sampling import AuditRows
from r3.trainer.tally import Tally

# Bytes that counting may take at once, for what is kept of routers and for comparing it.
ROOM_BYTES = 512 * 2**20
# Flags of a row, of that many bytes, as one integer.
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# Values and ids that a router chooses by its scores.
Choose = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# A layer as this rank and as the model counts it, whether it is forced, and whether its own choice is undecided.
Layer = tuple[int, int, bool, bool]


@dataclass(frozen=True, slots=True, eq=False)
class Undecided:
    """An own choice that is still to be made: scores `[t, experts]`, and what makes it of any rows, values and ids."""

    scores: torch.Tensor
    choose: Choose


class PassCounts:
    """Counts the first passes of some microbatches into `tally`: `begin` each one, and `count` when all are finished.

    It counts by itself where more is kept than there is room for.
    """

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self._kept: dict[tuple[int, Layer], list[_Block]] = {}
        self._bytes = 0

    def begin(self, routing: MicrobatchRouting, record: RoutedRecord, chunk: int = 0) -> MicrobatchCounts:
        """Return what takes the router calls of the next microbatch that `chunk` of the model runs."""
        return MicrobatchCounts(self, routing, record, chunk)

    def keep(self, block: _Block) -> None:
        """Keep a block, or count what was kept before where it takes too much room."""
        size = block.layers * block.layer_bytes
        if self._bytes + size > ROOM_BYTES:
            self.count()
        self._kept.setdefault(block.key, []).append(block)
        self._bytes += size

    def count(self) -> None:
        """Count all that is kept."""
        for blocks in self._kept.values():
            _Joined(self.tally, blocks).count()
        self._kept.clear()
        self._bytes = 0


class MicrobatchCounts:
    """Takes the router calls of one microbatch, an `add` for each, then `finish`.

    They are handed on in blocks of consecutive layers that are all forced or all free, as many as there is room for.
    """

    def __init__(self, kept: PassCounts, routing: MicrobatchRouting, record: RoutedRecord, chunk: int) -> None:
        self.routing, self.record = routing, record
        self._kept, self._tally, self._chunk = kept, kept.tally, chunk
        # Which microbatch this is.
        self.index = self._tally.runs.get(chunk, 0)
        self._block: _Block | None = None

    def add(self, local: int, column: int, own: torch.Tensor | Undecided, routing_map: torch.Tensor | None) -> None:
        """Take what one router chose and used.

        `local` counts the MoE layers of this rank, `column` those of the model. `own` int64 `[t, k]`: its own choice;
        `routing_map` bool `[t, experts]`: what its experts get, None where it was not forced.
        """
        self._tally.visits[column] = self._tally.visits.get(column, 0) + 1
        scores, choose = (own.scores, own.choose) if isinstance(own, Undecided) else (own, None)
        block, here = self._block, (local, column, routing_map is not None, choose is not None)
        if block is None or block.next != here or (block.layers + 1) * block.layer_bytes > ROOM_BYTES:
            self._hand_over()
            size = self._bytes(own, routing_map)
            block = self._block = _Block(self, local, column, routing_map is not None, choose, size)
        block.layers += 1
        if self.routing.compare:
            block.own.append(scores)
        if routing_map is not None:
            block.maps.append(routing_map)

    def finish(self, *, count: bool = False) -> None:
        """Note that this microbatch was run; `count` it and what else is kept, or keep it."""
        self._hand_over()
        routed = self.routing.experts is not None
        self._tally.finish_microbatch(self._chunk, routed)
        if routed and self.routing.compare:
            self._tally.recorded[self.index] = self.record.recorded
        if count:
            self._kept.count()

    @cached_property
    def audit(self) -> AuditRows | None:
        """The rows of the audit, made once and when they are counted."""
        return None if self.routing.audit is None else self.routing.audit()

    def _hand_over(self) -> None:
        if self._block is not None:
            self._kept.keep(self._block)
        self._block = None

    def _bytes(self, own: torch.Tensor | Undecided, routing_map: torch.Tensor | None) -> int:
        """Return what it takes to keep and count one layer."""
        assert self.routing.experts is not None
        rows, k = self.routing.recorded.numel(), self.routing.experts.shape[-1]
        # A map and its copy, and of the used ids twice.
        size = 0 if routing_map is None else 2 * rows * (routing_map.shape[1] + k)
        if isinstance(own, Undecided):
            size += 2 * own.scores.nbytes
        if self.routing.compare:
            # Ids of both sides and every id with every other.
            size += rows * k * (16 + k)
        return size + len(LAGS) * self.routing.audited * k * (16 + k)


@dataclass(slots=True, eq=False)
class _Block:
    """Consecutive layers of a microbatch, from `begin` (local) and `column` on; tensors as `add` took them, by layer.

    `layer_bytes`: what it takes to keep and count one of them; `own`: scores where `choose` makes the choice of them.
    """

    of: MicrobatchCounts
    begin: int
    column: int
    forced: bool
    choose: Choose | None
    layer_bytes: int
    layers: int = 0
    own: list[torch.Tensor] = field(default_factory=list)
    maps: list[torch.Tensor] = field(default_factory=list)

    @property
    def next(self) -> Layer:
        """The layer that would go on this block: local, column, forced, undecided."""
        return self.begin + self.layers, self.column + self.layers, self.forced, self.choose is not None

    @property
    def key(self) -> tuple[int, Layer]:
        """What blocks must share to be counted together: their number of layers, and which these are."""
        return self.layers, self.next


class _Joined:
    """The same layers of some microbatches, `t` rows in all, one microbatch behind the other."""

    def __init__(self, tally: Tally, blocks: Sequence[_Block]) -> None:
        self._tally, self._blocks, first = tally, blocks, blocks[0]
        self._columns = slice(first.column, first.column + first.layers)
        end = first.begin + first.layers
        self._ids = _joined([block.of.record.layers(first.begin, end) for block in blocks], 1)
        recorded = [block.of.record.recorded for block in blocks]
        # Rows of each microbatch.
        self._sizes = [len(rows) for rows in recorded]
        self._recorded = _joined(recorded, 0)
        self._mask = self._recorded[:, None]

    def count(self) -> None:
        """Count them."""
        first = self._blocks[0]
        if first.maps:
            used = self._by_layer([block.maps for block in self._blocks]).gather(2, self._ids)
            self._count_used(used.bool())
        if first.own:
            own = self._own()
            self._compare(own)
            audit = self._audit_pairs()
            if audit is not None:
                self._overlap(own, audit)

    def _own(self) -> torch.Tensor:
        """Return the own choice, int64 `[layers, t, k]`."""
        own, choose = self._by_layer([block.own for block in self._blocks]), self._blocks[0].choose
        if choose is None:
            return own
        begin = time.perf_counter()
        chosen = choose(own.flatten(0, 1))[1].view_as(self._ids)
        # Routers choose without replay, too: this is none of its own time, in which counting is.
        self._tally.seconds -= time.perf_counter() - begin
        return chosen

    def _by_layer(self, parts: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        """Return tensors `[rows, n]` by microbatch and layer as one `[layers, t, n]`."""
        joined = torch.cat([part[layer] for layer in range(len(parts[0])) for part in parts])
        return joined.view(len(parts[0]), -1, joined.shape[1])

    def _count_used(self, used: torch.Tensor) -> None:
        """Count which recorded ids were used, `used` bool `[layers, t, k]`."""
        self._tally.mismatched_ids.add_((~used & self._mask).sum())
        self._tally.followed[self._columns].add_((all_of_row(used) & self._recorded).sum(-1))

    def _compare(self, own: torch.Tensor) -> None:
        """Count where the own choice, int64 `[layers, t, k]`, is another than the record."""
        ids, tally = self._ids, self._tally
        differs = ~all_of_row(contained(ids, own)) & self._recorded
        tally.disagree[self._columns].add_(differs.sum(-1))
        recorded = self._mask.long().expand(ids.shape[1:]).reshape(1, -1).expand(len(ids), -1)
        tally.loads[self._columns].scatter_add_(1, ids.flatten(1), recorded)
        tally.repeated.add_((repeats(ids) & self._recorded).sum())
        anywhere = differs.any(0).split(self._sizes)
        parts = zip(self._blocks, anywhere, differs.split(self._sizes, 1), strict=True)
        columns = range(self._columns.start, self._columns.stop)
        for block, rows, by_layer in parts:
            flags = dict(zip(columns, by_layer.unbind(0), strict=True)) if block.of.routing.trace else {}
            tally.note_differences(block.of.index, rows, flags)

    def _audit_pairs(self) -> AuditPairs | None:
        """Return the pairs of all microbatches, None where nothing is audited."""
        begins = accumulate(self._sizes, initial=0)
        rows = [(block.of.audit, begin) for block, begin in zip(self._blocks, begins, strict=False)]
        audited = [one.moved(begin) for one, begin in rows if one is not None]
        return AuditPairs.of(AuditRows.join(audited), self._ids.device) if audited else None

    def _overlap(self, own: torch.Tensor, audit: AuditPairs) -> None:
        """Compare the own choice of the audited rows t with the record of rows t-1, t and t+1 of the same sequence."""
        tally, ids = self._tally, self._ids
        tally.overlap_pairs[self._columns] += audit.pairs
        tally.window_pairs += len(own) * audit.window_pairs
        hits = contained(ids.index_select(1, audit.record), own.index_select(1, audit.own)).sum(-1, dtype=torch.float64)
        tally.overlap[self._columns].view(len(own), -1).add_(hits @ audit.classes)
        tally.windows.index_add_(0, audit.window, hits[:, audit.lag0].sum(0))


def _joined(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def repeats(ids: torch.Tensor) -> torch.Tensor:
    """Tell which rows of `ids` `[..., k]` name an expert twice; bool `[...]`."""
    equal = ids.unsqueeze(-1) == ids.unsqueeze(-2)
    # One dimension after the other: on a CPU twice as fast as both at once.
    return any_of_row(any_of_row(equal.bitwise_and_(_earlier(ids.shape[-1], ids.device))))


@lru_cache
def _earlier(k: int, device: torch.device) -> torch.Tensor:
    """Return which places are before which, bool `[k, k]`."""
    return torch.ones(k, k, dtype=torch.bool, device=device).tril_(-1)


def contained(ids: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Tell for each of `ids` `[..., k]` whether the same row of `among` `[..., k]` has it; bool `[..., k]`."""
    return any_of_row(ids.unsqueeze(-1) == among.unsqueeze(-2))


def any_of_row(flags: torch.Tensor) -> torch.Tensor:
    """Return `flags.any(-1)` of contiguous flags, of few by one comparison: a GPU's reductions are made for many."""
    words = _as_words(flags)
    return flags.any(-1) if words is None else words != 0


def all_of_row(flags: torch.Tensor) -> torch.Tensor:
    """Return `flags.all(-1)` of contiguous flags, in the same way."""
    words = _as_words(flags)
    return flags.all(-1) if words is None else words == (2 ** (8 * flags.shape[-1]) - 1) // 255


def _as_words(flags: torch.Tensor) -> torch.Tensor | None:
    dtype = _WORDS.get(flags.shape[-1])
    return None if dtype is None else flags.view(dtype).squeeze(-1)
