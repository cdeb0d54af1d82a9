"""Records that came through shared memory, with a ticket in the answer's place of them."""

from __future__ import annotations

import zlib

import numpy as np

from r3.errors import RoutingError
from r3.rollout.segment import Owner, Ticket, as_rows
from r3.rollout.wire import Decoded, read_rows
from r3.routing import TokenIds, expert_dtype
from r3.types import ModelSpec, WeightVersion

# A ticket may arrive a pass before its rows; after that long, nothing writes them any more.
TIMEOUT_S = 60.0


def read_returned(
    owner: Owner,
    found: tuple[Ticket, int, int],
    tokens: TokenIds,
    model: ModelSpec,
    *,
    request: int | str,
    weight_version: WeightVersion,
    engine: str,
    start: int,
) -> tuple[Decoded, bytes]:
    """Return the record behind a ticket `(ticket, first row, rows)`, checked like one from the wire, and its stamps.

    The rows of a model without dense layers are a view of the segment, which keeps their place while they are used.
    Raises `RoutingError`.
    """
    ticket, begin, rows = found
    try:
        taken = owner.take(ticket, TIMEOUT_S)
        wide = as_rows(taken, expert_dtype(model.num_experts), (rows, model.num_layers, model.top_k))
    except RoutingError as error:
        raise RoutingError(f"request {request}: {error}") from error
    decoded = read_rows(
        wide, tokens, model,
        request=request, weight_version=weight_version, engine=engine, begin=begin, start=start,
    )  # fmt: skip
    routing = decoded.routing
    if routing.experts.nbytes == len(taken.data):
        # The record's checksum begins with that of its rows, so what the scheduler wrote needs no second pass.
        expected = zlib.crc32(np.ascontiguousarray(tokens, dtype="<i4").view(np.uint8).data, taken.crc32)
        if expected != routing.crc32:
            raise RoutingError(
                f"request {request}: checksum {routing.crc32:#010x}, the scheduler's rows give {expected:#010x}; "
                "rows changed in shared memory"
            )
    return decoded, taken.trailer
