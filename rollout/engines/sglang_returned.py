"""Records that came through shared memory, with a ticket in the answer's place of them."""

from __future__ import annotations

from collections.abc import Mapping

from r3.errors import RoutingError
from r3.rollout.segment import Owner, Ticket, as_rows
from r3.rollout.wire import Decoded, read_rows
from r3.routing import RowsSeen, TokenIds, expert_dtype
from r3.types import ModelSpec, WeightVersion

# A ticket arrives one or two passes before its rows; after that long, nothing writes them any more.
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
    sound: Mapping[Ticket, RowsSeen],
) -> tuple[Decoded, bytes]:
    """Return the record behind a ticket `(ticket, first row, rows)`, checked like one from the wire, and its stamps.

    `sound`: what an `EarlyLook` found. The rows of a model without dense layers are a view of the segment, which keeps
    their place while they are used. Raises `RoutingError`.
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
        seen=sound.get(ticket),
    )  # fmt: skip
    return decoded, taken.trailer
