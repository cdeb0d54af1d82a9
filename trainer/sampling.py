"""Which rows of a microbatch the audit compares, and with which rows of the record; numpy only.

The choice (`r3.audit.choose_windows`) counts the recorded rows of the whole step, so it does not depend on the layout:
every rank finds the rows of its own part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from r3.audit import LAGS, choose_windows
from r3.trainer.rows import Bools, Ints


@dataclass(frozen=True, slots=True)
class AuditPlan:
    """The audited windows `[n, 2]` of a step, in recorded rows counted over its trajectories in order.

    `offsets` int64 `[trajectories + 1]`: the first recorded row of each trajectory; `places` int64: the window of every
    recorded row, -1 for one that is not audited.
    """

    windows: Ints
    offsets: Ints
    places: Ints

    @classmethod
    def of(cls, rows: Ints, turn: int) -> AuditPlan:
        """Plan the audit of step `turn`, of whose trajectories `rows` int64 `[n]` are recorded."""
        offsets = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        windows = choose_windows(int(offsets[-1]), turn)
        places = np.full(offsets[-1], -1, np.int64)
        for index, (begin, end) in enumerate(windows):
            places[begin:end] = index
        return cls(windows, offsets, places)

    def of_rows(self, i: int) -> Ints:
        """Return the window of every recorded row of trajectory `i`, -1 for one that is not audited."""
        return self.places[self.offsets[i] : self.offsets[i + 1]]

    def trajectory(self, row: int) -> int:
        """Return the trajectory that recorded row `row` of the step belongs to."""
        return int(np.searchsorted(self.offsets, row, side="right")) - 1


@dataclass(frozen=True, slots=True)
class AuditRows:
    """Pairs of rows to compare, as indices into a router's rows `[s * b]`.

    `own`, `record`: for each lag -1, 0, +1 the rows whose own choice is looked at and, of the same length, the rows
    whose record it is compared with, `sampled` bool: of which of them the engine sampled the token (the rows of a
    shared prompt fit many records); `window`: of each pair at lag 0.
    """

    own: tuple[Ints, ...]
    record: tuple[Ints, ...]
    sampled: tuple[Bools, ...]
    window: Ints

    @classmethod
    def join(cls, parts: Sequence[AuditRows]) -> AuditRows:
        """Return the pairs of all `parts`, whose rows lie behind each other (`moved`)."""
        own, record, sampled = (
            tuple(np.concatenate(of_lag) for of_lag in zip(*lists, strict=True))
            for lists in ([p.own for p in parts], [p.record for p in parts], [p.sampled for p in parts])
        )
        return cls(own, record, sampled, np.concatenate([part.window for part in parts]))

    def moved(self, begin: int) -> AuditRows:
        """Return the same pairs among rows of which the first is `begin`."""
        own, record = (tuple(rows + begin for rows in of_lag) for of_lag in (self.own, self.record))
        return replace(self, own=own, record=record)


def audit_rows(recorded: Bools, order: Ints, windows: Ints, sampled: Bools) -> AuditRows:
    """Return the pairs of one rank's rows of a microbatch, each argument `[b, r]` (`MicroBatch`).

    Pairs that are cut apart, at the edge of a context- or sequence-parallel rank's rows, are left out.
    """
    sequences, rows = recorded.shape
    has_record, place = recorded.reshape(-1), order.reshape(-1)
    here = np.flatnonzero(recorded & (windows >= 0))
    b, s = np.divmod(here, rows)
    routed, places, drawn = s * sequences + b, place[here], sampled.reshape(-1)[here]
    own, record, parts = [], [], []
    for lag in LAGS:
        other = (s + lag) % rows
        there = b * rows + other
        # The last position of a sequence has no record, so no row is paired with one of another sequence.
        valid = has_record[there] & (place[there] == places + lag)
        own.append(routed[valid])
        record.append((other * sequences + b)[valid])
        parts.append(drawn[valid])
    return AuditRows(tuple(own), tuple(record), tuple(parts), windows.reshape(-1)[here])
