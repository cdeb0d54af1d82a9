"""Structural checks of a whole record that look across its rows; those of a single row are in `r3.routing`."""

from __future__ import annotations

import numpy as np

from r3.errors import RoutingError
from r3.routing import RoutingTrace, TokenIds

# SGLang PR #36404 shows one row 67 times. A live router does not repeat a row in every layer and slot for other tokens.
LONGEST_RUN = 32


def check_repeated_rows(routing: RoutingTrace, tokens: TokenIds) -> None:
    """Raise `RoutingError` where at least `LONGEST_RUN` rows in a row are the same although their tokens differ.

    `tokens` int32 `[S]` are the record's own. Equal tokens in a row may well be routed alike, so they prove nothing.
    """
    experts = routing.experts
    if len(experts) < LONGEST_RUN:
        return
    flat = experts.reshape(len(experts), -1)
    # Edges of the runs of equal neighbours: row t equals row t - 1.
    same = np.concatenate([[False], (flat[1:] == flat[:-1]).all(1), [False]])
    edges = np.flatnonzero(same[1:] != same[:-1])
    where = routing.positions()
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        found = tokens[where[begin : end + 1]]
        if end - begin + 1 >= LONGEST_RUN and (found != found[0]).any():
            raise RoutingError(
                f"rows {begin} to {end} are the same in every layer although their tokens differ; "
                "the engine wrote one row many times"
            )
