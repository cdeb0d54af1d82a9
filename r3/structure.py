"""What cannot be true of routing rows, found without another forward pass; numpy only.

The whole check costs at most 2 ms per million ids on one core (`scripts/bench/checks.py`): it runs over every sample,
beside generation. A well-formed row of another token, layer or request passes all of it; `docs/checks.md` says what
finds those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from r3.errors import RoutingError

ExpertIds = NDArray[np.unsignedinteger]
Bools = NDArray[np.bool_]

# Rows and changes of token over which a layer may not keep one expert list.
CONSTANT_ROWS = 256
# Changes of token over which the rows of *all* layers may not stay the same. A router that kept them at every second
# change, which no router with 2**32 possible rows comes near, would do so 32 times running in one of 2**32 places;
# the fault that this finds (SGLang PR #36404) repeated one row 67 times.
RUN_CHANGES = 32
# A model with fewer possible rows than 2**32 (one layer, few experts, top-k = all) may repeat itself by chance.
RUN_BITS = 32
# (row, layer) pairs per round of the duplicate check: few enough for the cache, enough to hide the calls (measured).
_PAIRS = 65_536
# Ids of a list whose flags fill a word.
_WORDS = (2, 4, 8)


class Run(NamedTuple):
    """Rows `[begin, begin + rows)` of a record are identical in all layers; `changes` of token lie between them."""

    begin: int
    rows: int
    changes: int


def has_repeats(experts: ExpertIds) -> bool:
    """Tell whether any (row, layer) of `[rows, layers, k]` names an expert twice, as a row that was never written does.

    Compares of contiguous ids, block by block: many times faster than compares of strided columns or a sort
    (`scripts/bench/checks.py`).
    """
    k = experts.shape[2]
    lists = experts.reshape(-1, k)
    repeats = _repeats_in_words if k in _WORDS else _repeats_in_planes
    return k > 1 and any(repeats(lists[begin : begin + _PAIRS]) for begin in range(0, len(lists), _PAIRS))


def _repeats_in_words(lists: ExpertIds) -> bool:
    """Compare every id with the one `distance` behind it, whosever that is, and look at a list's flags as one word."""
    k, ids = lists.shape[1], lists.reshape(-1)
    equal = np.zeros(len(ids), np.bool_)
    for distance in range(1, k):
        np.equal(ids[distance:], ids[:-distance], out=equal[:-distance])
        anywhere = np.bitwise_or.reduce(equal.view(f"<u{k}"))
        # Byte i stands for slots i and i + distance, which is another list's from k on.
        if int(anywhere) & (1 << 8 * (k - distance)) - 1:
            return True
    return False


def _repeats_in_planes(lists: ExpertIds) -> bool:
    """Bring equal slots together; one compare for every distance between slots holds all pairs at that distance."""
    size, k = lists.shape
    planes = np.ascontiguousarray(lists.T).reshape(-1)
    equal = np.empty((k - 1) * size, np.bool_)
    for distance in range(1, k):
        found = equal[: (k - distance) * size]
        np.equal(planes[distance * size :], planes[: (k - distance) * size], out=found)
        if found.any():
            return True
    return False


def repeated_ids(experts: ExpertIds) -> Bools:
    """Return where a row names an expert twice, `[rows, layers]`; slow, for the message of a record that is wrong."""
    repeated = np.zeros(experts.shape[:2], dtype=np.bool_)
    for a, b in combinations(range(experts.shape[2]), 2):
        repeated |= experts[:, :, a] == experts[:, :, b]
    return repeated


def constant_layers(pieces: Sequence[ExpertIds]) -> Bools:
    """Return which layers send every row of `pieces`, each `[rows, layers, k]`, to one expert list, `[layers]`.

    None does where there is no row.
    """
    filled = [piece for piece in pieces if len(piece)]
    if not filled:
        return np.zeros(pieces[0].shape[1], np.bool_)
    first = filled[0][0]
    constant: Bools = np.ones(len(first), np.bool_)
    for piece in filled:
        # Two rows rule out every live layer.
        constant &= (piece[[len(piece) // 2, -1]] == first).all(axis=(0, 2))
        if not constant.any():
            break
        constant[constant] = (piece[:, constant] == first[constant]).all(axis=(0, 2))
    return constant


def check_constant_layers(
    pieces: Sequence[ExpertIds], layers: Sequence[int], minimum_rows: int = CONSTANT_ROWS, rows: int | None = None
) -> None:
    """Raise `RoutingError` when a layer sends all of at least `minimum_rows` rows to one and the same expert list.

    Call it over all rows of a batch, in `pieces` of `[rows, layers, k]`: a live router never does that, a buffer that
    was written once does (SGLang PR #36404 shows one row 67 times). `rows`: how many rows these stand for, where shared
    ones are there once.
    """
    count = sum(map(len, pieces)) if rows is None else rows
    if count < minimum_rows or not pieces:
        return
    constant = constant_layers(pieces)
    if constant.any():
        layer, first = int(np.argmax(constant)), next(piece[0] for piece in pieces if len(piece))
        raise RoutingError(
            f"layer {layers[layer]} routes all {count} rows to {first[layer].tolist()}; its router was not captured"
        )


def repeated_rows(experts: ExpertIds) -> Bools:
    """Return which rows of `[rows, layers, k]` equal the next one in every layer, `[rows - 1]`."""
    rows = experts.reshape(len(experts), experts.shape[1] * experts.shape[2])
    # The first layer tells nearly all neighbours apart.
    first = experts[:, 0]
    same: Bools = (first[1:] == first[:-1]).all(axis=1)
    where = np.flatnonzero(same)
    same[where] = (rows[where + 1] == rows[where]).all(axis=1)
    return same


def longest_run(experts: ExpertIds, inputs: NDArray[np.integer], same: Bools | None = None) -> Run:
    """Return the run of identical rows with the most changes of token; `inputs` `[rows]`: the token of each row.

    `same`: what `repeated_rows` said of them, where it was asked before.

    Equal neighbouring tokens may well route alike in every layer: attention over equal values gives the same value.
    So a run proves something only where the token changes and the row does not.
    """
    same = repeated_rows(experts) if same is None else same
    edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)))
    if not len(edges):
        return Run(0, min(len(experts), 1), 0)
    begins, ends = edges[::2], edges[1::2]
    changed = np.concatenate([[0], np.cumsum(inputs[1:] != inputs[:-1])])
    changes = changed[ends] - changed[begins]
    best = int(np.lexsort((ends - begins, changes))[-1])
    return Run(int(begins[best]), int(ends[best] - begins[best]) + 1, int(changes[best]))


def check_runs(experts: ExpertIds, inputs: NDArray[np.integer], num_experts: int, same: Bools | None = None) -> None:
    """Raise `RoutingError` when rows stay identical in all layers over `RUN_CHANGES` changes of token."""
    _, layers, k = experts.shape
    if len(experts) <= RUN_CHANGES or layers * math.log2(math.comb(num_experts, k)) < RUN_BITS:
        return
    run = longest_run(experts, inputs, same)
    if run.changes >= RUN_CHANGES:
        raise RoutingError(
            f"rows {run.begin} to {run.begin + run.rows - 1} are identical in all {layers} layers although their token "
            f"changes {run.changes} times; one row was written over the others (SGLang PR #36404)"
        )


def check_live(
    experts: ExpertIds,
    layers: Sequence[int],
    num_experts: int,
    inputs: NDArray[np.integer],
    same: Bools | None = None,
) -> None:
    """Raise `RoutingError` where rows `[rows, layers, k]` do not react to their tokens `inputs` `[rows]`.

    A layer that never changes, or rows that repeat, over tokens that do change. A record of one token over and over is
    no evidence, and is accepted.
    """
    if not experts.size:
        return
    check_runs(experts, inputs, num_experts, same)
    if experts.shape[2] < num_experts and np.count_nonzero(inputs[1:] != inputs[:-1]) >= CONSTANT_ROWS:
        check_constant_layers([experts], layers)
