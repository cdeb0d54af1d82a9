"""What becomes of a sample whose record is missing or malformed: the policies of `routing`, as a pure function."""

from __future__ import annotations

from typing import Literal

from r3.config import OnDefect, RoutingConfig
from r3.errors import MissingRoutingError, RoutingError
from r3.rollout.engine import Generation

Fate = Literal["keep", "drop", "native"]


def fate(answer: Generation, defect: RoutingError | None, routing: RoutingConfig) -> tuple[Fate, str]:
    """Return what becomes of an answer and, unless it is kept as it is, why.

    An aborted answer is dropped whatever its record is. Raises the defect where the policy is `fail`, with the key that
    decides.
    """
    if answer.finish == "abort":
        return "drop", "aborted by the engine" + (f"; {defect}" if defect else "")
    if defect is None:
        return "keep", ""
    missing = isinstance(defect, MissingRoutingError)
    key = "routing.on_missing" if missing else "routing.on_error"
    policy: OnDefect = routing.on_missing if missing else routing.on_error
    if policy == "fail":
        raise type(defect)(f"{defect} ({key}: drop_sample would leave the sample out, native_sample not replay it)")
    return ("drop" if policy == "drop_sample" else "native"), f"{defect} ({key}: {policy})"
