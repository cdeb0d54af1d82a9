"""What an answer carries in the place of its rows: `meta_info.r3_routing`, one value per token, of which the last is
`[number, offset, first row, rows]` of a record in the segment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from r3.errors import RoutingError
from r3.rollout.segment import Ticket

TICKET_KEY = "r3_routing"


def ticket_of(meta: Mapping[str, Any]) -> tuple[Ticket, int, int] | None:
    """Return the ticket of an answer, the position of its first row and its rows; None where rows came with it."""
    values = meta.get(TICKET_KEY)
    # The last one: it is read for every answer, and there is one per token.
    found = next((v for v in reversed(values) if v is not None), None) if isinstance(values, list) else values
    if found is None:
        return None
    try:
        number, offset, begin, rows = (int(part) for part in found)
    except (TypeError, ValueError) as error:
        raise RoutingError(f"{TICKET_KEY} is {str(found)[:80]!r}, no ticket of a record ({error})") from error
    return Ticket(number, offset), begin, rows
