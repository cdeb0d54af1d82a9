"""Records of several turns of one conversation, joined by absolute position."""

from __future__ import annotations

import numpy as np

from r3.errors import RoutingError
from r3.routing import RoutingTrace, Span, TokenIds, positions


def next_start(earlier: RoutingTrace) -> int:
    """Return the `Request.routing_start` of the turn after `earlier`: the position behind its last row.

    That is `len(tokens) - 1`, not `len(tokens)`: the last token was sampled and never an input, so its row comes with
    the next turn.
    """
    return earlier.spans[-1].end if earlier.spans else 0


def merge_turns(earlier: RoutingTrace, later: RoutingTrace, tokens: TokenIds) -> RoutingTrace:
    """Return one record of both turns; `tokens` `[S]` are those of the later one, which begin with the earlier's.

    Rows that both hold must name the same experts where one weight version wrote both; under another version the
    earlier row stays, because its token was sampled with it (verl issue #6046). Raises `RoutingError` for tokens that
    were changed between the turns, a gap, and rows that disagree.
    """
    end = next_start(earlier)
    later.verify(tokens)
    earlier.verify(tokens[: end + 1])
    if not later.spans:
        return earlier
    begin = later.spans[0].begin
    if begin > end:
        raise RoutingError(
            f"the later turn begins at position {begin}, the earlier one ends before {end}; rows between are missing, "
            f"ask for routing_start={end}"
        )
    _check_overlap(earlier, later, begin, end)
    if later.spans[-1].end <= end:
        return earlier
    return earlier.concatenate(later.clip(end, len(tokens), tokens), tokens)


def _check_overlap(earlier: RoutingTrace, later: RoutingTrace, begin: int, end: int) -> None:
    ours, theirs = positions(earlier.spans), positions(later.spans)
    both = np.intersect1d(ours, theirs)
    if earlier.experts.shape[1:] != later.experts.shape[1:] or not len(both):
        return  # other models are `concatenate`'s to refuse
    mine, yours = np.searchsorted(ours, both), np.searchsorted(theirs, both)
    same_weights = _versions(earlier.spans)[mine] == _versions(later.spans)[yours]
    first, second = np.sort(earlier.experts[mine], axis=-1), np.sort(later.experts[yours], axis=-1)
    differs = (first != second).any(axis=(1, 2)) & same_weights
    if differs.any():
        at = int(np.argmax(differs))
        raise RoutingError(
            f"{int(differs.sum())} of {len(both)} rows that two turns share disagree under one weight version, first "
            f"at position {int(both[at])}; they are not of the same conversation, or the engine's cache moved them"
        )


def _versions(spans: tuple[Span, ...]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Weight version of every row, `[rows]` int64."""
    return np.repeat(
        np.array([span.weight_version for span in spans], dtype=np.int64), [span.end - span.begin for span in spans]
    )
