"""Ways in which a routing record goes wrong, and the three stages that may find it, each alone.

*Wire*: the record was sealed while it was right, and damaged on its way. *Structural*: it was wrong when it was made,
so its checksums are right. *Semantic*: the same, seen by a trainer that compares it with its own router.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from r3 import record
from r3.errors import RoutingError
from r3.routing import RoutingTrace
from tests.synthetic_router import Sample

Ids = NDArray[np.int64]
# Takes rows `[rows, layers, k]`, those of another sequence of the same model, the expert count; returns wrong rows.
Change = Callable[[Ids, Ids, int, np.random.Generator], Ids]
WINDOW = 256


def clean(rows: Ids, other: Ids, experts: int, draw: np.random.Generator) -> Ids:
    return rows


def flip_bit(rows: Ids, other: Ids, experts: int, draw: np.random.Generator) -> Ids:
    """Flip one bit of one id, in the bits that an id of the model has."""
    at = tuple(draw.integers(0, size) for size in rows.shape)
    rows[at] ^= 1 << int(draw.integers(0, (experts - 1).bit_length()))
    return rows


def shift(rows: Ids, other: Ids, experts: int, draw: np.random.Generator) -> Ids:
    """All rows one position early or late; the row that falls out comes in at the other end."""
    return np.roll(rows, draw.choice([-1, 1]), axis=0)


def swap_layers(rows: Ids, other: Ids, experts: int, draw: np.random.Generator) -> Ids:
    one, two = draw.choice(rows.shape[1], 2, replace=False)
    rows[:, [one, two]] = rows[:, [two, one]]
    return rows


def drop_rows(rows: Ids, other: Ids, experts: int, draw: np.random.Generator) -> Ids:
    """The last rows are missing."""
    return rows[: int(draw.integers(0, len(rows)))]


def repeat_id(rows: Ids, other: Ids, experts: int, draw: np.random.Generator) -> Ids:
    row, layer = (int(draw.integers(0, size)) for size in rows.shape[:2])
    one, two = draw.choice(rows.shape[2], 2, replace=False)
    rows[row, layer, one] = rows[row, layer, two]
    return rows


def foreign_rows(rows: Ids, other: Ids, experts: int, draw: np.random.Generator) -> Ids:
    """Rows of another sequence, all of them."""
    return np.resize(other, rows.shape)


def foreign_window(rows: Ids, other: Ids, experts: int, draw: np.random.Generator) -> Ids:
    """Between 1 row and all, at the same positions of another sequence: slots that were written for another request."""
    begin, end = _window(len(rows), 1, draw)
    rows[begin:end] = np.resize(other, rows.shape)[begin:end]
    return rows


def shuffle_rows(rows: Ids, other: Ids, experts: int, draw: np.random.Generator) -> Ids:
    return rows[draw.permutation(len(rows))]


def zeros(rows: Ids, other: Ids, experts: int, draw: np.random.Generator) -> Ids:
    """Between 1 row and all were never written, in one layer or in all."""
    begin, end = _window(len(rows), 1, draw)
    layer = slice(None) if draw.random() < 0.5 else int(draw.integers(0, rows.shape[1]))
    rows[begin:end, layer] = 0
    return rows


def one_row_over_others(rows: Ids, other: Ids, experts: int, draw: np.random.Generator) -> Ids:
    """67 rows or more are one row (SGLang PR #36404)."""
    begin, end = _window(len(rows), 67, draw)
    rows[begin:end] = rows[begin]
    return rows


def physical_ids(rows: Ids, other: Ids, experts: int, draw: np.random.Generator) -> Ids:
    """Ids after an expert-parallel remap without redundant experts: a permutation."""
    return draw.permutation(experts)[rows]


def filler(rows: Ids, other: Ids, experts: int, draw: np.random.Generator) -> Ids:
    """-1 in two slots of some rows, as in padding."""
    begin, end = _window(len(rows), 1, draw)
    rows[begin:end, :, -2:] = -1
    return rows


CHANGES: dict[str, Change] = {
    "none": clean,
    "bit flip in an id": flip_bit,
    "duplicated id": repeat_id,
    "zeros (rows never written)": zeros,
    "-1 in two slots": filler,
    "last rows missing": drop_rows,
    "one row over 67 others or more": one_row_over_others,
    "all rows one token early or late": shift,
    "two layers swapped": swap_layers,
    "rows of another sequence, all": foreign_rows,
    "rows of another sequence, 1 to all": foreign_window,
    "rows shuffled": shuffle_rows,
    "physical ids (permutation)": physical_ids,
}


def changed(name: str, sample: Sample, other: Sample, draw: np.random.Generator) -> Ids:
    """Return wrong rows of a sample, in a wide dtype."""
    rows, foreign = (one.trace.experts.astype(np.int64) for one in (sample, other))
    return CHANGES[name](rows, foreign, sample.trace.num_experts, draw)


def found_on_wire(sample: Sample, rows: Ids) -> bool:
    """Put wrong rows into the place of those of a sealed record: does the reader refuse it?"""
    data = bytearray(sample.trace.to_bytes(sample.tokens))
    size = sample.trace.experts.nbytes
    begin = len(data) - -(-size // 8) * 8
    made = rows.astype(sample.trace.experts.dtype).tobytes()
    data[begin : begin + size] = made + bytes(-(-size // 8) * 8 - size if len(made) == size else 0)
    return refused(bytes(data))


def refused(data: bytes) -> bool:
    """Does the reader refuse these bytes?"""
    try:
        record.decode(data)
    except RoutingError:
        return True
    return False


def found_by_structure(sample: Sample, rows: Ids) -> bool:
    """Make a record of wrong rows: is it refused, or shorter than its tokens need?"""
    trace = sample.trace
    try:
        made = RoutingTrace.record(
            rows, sample.tokens, layers=trace.layers, num_experts=trace.num_experts, weight_version=1, engine="e"
        )
    except RoutingError:
        return True
    return made.rows != len(sample.tokens) - 1


def found_by_meaning(sample: Sample, rows: Ids) -> bool:
    """Compare wrong rows with the trainer's own choice, as the rules of docs/checks.md say."""
    shared = min(len(rows), len(sample.own))
    if not shared:
        return True
    experts = sample.trace.num_experts
    if rows.min() < 0 or rows.max() >= experts:
        rows = np.clip(rows, 0, experts - 1)
    chosen = np.zeros((len(sample.own), rows.shape[1], experts), np.bool_)
    np.put_along_axis(chosen, sample.own.astype(np.int64), True, axis=2)

    def overlap(recorded: Ids, own: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.take_along_axis(own, recorded, axis=2).mean(axis=2, dtype=np.float64)

    now = overlap(rows[:shared], chosen[:shared])
    late = overlap(rows[1:shared], chosen[: shared - 1]).mean() if shared > 1 else 0.0
    early = overlap(rows[: shared - 1], chosen[1:shared]).mean() if shared > 1 else 0.0
    layers, by_row = now.mean(axis=0), now.mean(axis=1)
    windows = [by_row[begin : begin + WINDOW].mean() for begin in range(0, shared - WINDOW + 1, WINDOW // 2)]
    return bool(
        now.mean() < 0.5
        or now.mean() < max(late, early)
        or layers.min() < 0.5 * np.median(layers)
        or min(windows, default=1.0) < 0.5 * now.mean()
    )


def _window(rows: int, least: int, draw: np.random.Generator) -> tuple[int, int]:
    size = int(draw.integers(min(least, rows), rows + 1))
    begin = int(draw.integers(0, rows - size + 1))
    return begin, begin + size
