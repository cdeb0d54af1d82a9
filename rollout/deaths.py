"""What calls of rollout workers end with when a worker dies: whose death it was, and what it did to the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import ray
from ray import ObjectRef
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError

from r3.errors import EngineError, R3Error

DEATHS = (RayActorError, WorkerCrashedError, OutOfMemoryError)
# How long a worker's death is waited for once another one has met its consequences, and the others' calls behind one.
_SETTLE_S = 2.0


class WorkerDied(EngineError):
    """A rollout worker died in a call that means nothing to a replacement.

    `returned`: workers whose own part of the call came back well. `blocked`: those that wait for the dead one without
    an end and are to be replaced with it, which whoever made the call knows.
    """

    def __init__(self, worker: int, cause: BaseException, returned: frozenset[int] = frozenset()) -> None:
        super().__init__(f"rollout worker {worker} died: {first_line(cause)}")
        self.worker, self.cause, self.returned = worker, cause, returned
        self.blocked: tuple[int, ...] = ()


def returned(pending: Mapping[ObjectRef, int]) -> frozenset[int]:
    """Return which workers' calls come back well within the moment that a lost peer's consequences need."""
    found: set[int] = set()
    for call in _settled(pending):
        try:
            ray.get(call)
            found.add(pending[call])
        except (*DEATHS, RayTaskError):
            continue
    return frozenset(found)


def require_alive(pending: Mapping[ObjectRef, int], back: frozenset[int]) -> None:
    """Raise `WorkerDied` where a death is behind what another worker met, such as a peer of its group that is gone.

    `back`: the workers whose calls have come back before.
    """
    died: list[tuple[int, BaseException]] = []
    for call in _settled(pending):
        try:
            ray.get(call)
            back |= {pending[call]}
        except DEATHS as error:
            died.append((pending[call], error))
        except RayTaskError:
            continue
    for worker, cause in died[:1]:
        raise WorkerDied(worker, cause, back) from cause


def _settled(pending: Mapping[ObjectRef, int]) -> list[ObjectRef]:
    calls: list[ObjectRef] = list(pending)
    return ray.wait(calls, num_returns=len(calls), timeout=_SETTLE_S)[0] if calls else []


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def raise_cause(error: RayTaskError, worker: int, method: str) -> NoReturn:
    """Raise the error that the worker raised, if it is one of ours, else an `EngineError` that carries it."""
    if isinstance(error.cause, R3Error):
        raise error.cause from error
    raise EngineError(f"rollout worker {worker} failed in `{method}`: {error.cause!r}") from error
