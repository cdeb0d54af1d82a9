"""Prompt rows that the samples of a group share are stored once in a batch; numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from r3.routing import ExpertIds

# Rows of a block `[rows, layers, k]` as they are stored: all in one array, or an array of each trajectory's, None where
# it has none of its own.
BlockRows = ExpertIds | tuple[ExpertIds | None, ...]


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Which rows of each record a batch holds for it alone, and which it shares.

    `offsets` int64 `[n + 1]`: the rows stored for each trajectory. `shared` int64 `[n, 2]`: an earlier trajectory and
    how many of its first rows come before those, `(0, 0)` without any.
    """

    offsets: NDArray[np.int64]
    shared: NDArray[np.int64]

    @classmethod
    def of(cls, records: Sequence[ExpertIds | None], groups: Sequence[int], prompt_lens: Sequence[int]) -> StoredRows:
        """Find of each record `[rows, layers, k]` the prompt rows that equal those of its group's first record.

        Equal to the last id: samples whose prompt was computed apart may differ in a near-tie, and then keep their own
        from that row on. A record is therefore what it was, whatever is shared.
        """
        firsts: dict[int, int] = {}
        offsets = np.zeros(len(records) + 1, dtype=np.int64)
        shared = np.zeros((len(records), 2), dtype=np.int64)
        for i, (experts, group) in enumerate(zip(records, groups, strict=True)):
            count = 0
            if experts is not None:
                first = firsts.setdefault(group, i)
                leader = records[first]
                if leader is not None and first != i:
                    count = _common(experts, leader, min(prompt_lens[i], prompt_lens[first]))
                if count:
                    shared[i] = first, count
            offsets[i + 1] = offsets[i] + (0 if experts is None else len(experts) - count)
        return cls(offsets, shared)

    @property
    def counts(self) -> NDArray[np.int64]:
        """How many rows each record has, `[n]`."""
        return np.diff(self.offsets) + self.shared[:, 1]

    def count(self, i: int) -> int:
        """Return how many rows the record of trajectory `i` has."""
        return int(self.offsets[i + 1] - self.offsets[i] + self.shared[i, 1])

    @property
    def rows(self) -> int:
        """How many rows the records have together, shared ones counted in each."""
        return int(self.counts.sum())

    def take(self, i: int, stored: BlockRows) -> ExpertIds:
        """Return the rows of trajectory `i`, which has some, from those of a block; a view where they lie together."""
        leader, count = self.shared[i].tolist()
        found = _joined(self._own(leader, stored), count, self._own(i, stored))
        assert found is not None
        return found

    def all(self, stored: BlockRows) -> list[ExpertIds | None]:
        """Return the rows of every trajectory, None where it has none, as `take` does one by one."""
        own = [self._own(i, stored) for i in range(len(self.shared))]
        return [
            _joined(own[leader], count, rows) for rows, (leader, count) in zip(own, self.shared.tolist(), strict=True)
        ]

    def _own(self, i: int, stored: BlockRows) -> ExpertIds | None:
        if isinstance(stored, tuple):
            return stored[i]
        begin, end = self.offsets[i : i + 2].tolist()
        return stored[begin:end] if end > begin else None


def _joined(leader: ExpertIds | None, count: int, own: ExpertIds | None) -> ExpertIds | None:
    """Return the first `count` rows of `leader` and those of one's own behind them."""
    if not count:
        return own
    assert leader is not None
    if own is None:
        return leader[:count]
    rows = np.concatenate([leader[:count], own])
    rows.flags.writeable = False
    return rows


def _common(rows: ExpertIds, others: ExpertIds, most: int) -> int:
    """Return how many of the first `most` rows are alike, order of the slots included."""
    most = min(most, len(rows), len(others))
    if np.array_equal(rows[:most], others[:most]):
        return most
    return int(np.argmin((rows[:most] == others[:most]).all(axis=(1, 2))))
