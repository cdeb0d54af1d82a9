"""What calls of rollout workers end with when a worker dies: whose death it was, and what it did to the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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

    `returned`: workers whose own part of the call came back well; `dead`: all that died in it. `blocked`: those that
    wait for a dead one without an end and are to be replaced with it, which whoever made the call knows.
    """

    def __init__(
        self, worker: int, cause: BaseException, returned: Iterable[int] = (), dead: Iterable[int] = ()
    ) -> None:
        super().__init__(f"rollout worker {worker} died: {first_line(cause)}")
        self.worker, self.cause = worker, cause
        self.returned, self.dead = frozenset(returned), frozenset({worker, *dead})
        self.blocked: tuple[int, ...] = ()


def settle(pending: Mapping[ObjectRef, int]) -> tuple[set[int], dict[int, BaseException]]:
    """Return which workers' calls come back well within the moment that a lost peer's consequences need, and deaths."""
    calls: list[ObjectRef] = list(pending)
    done = ray.wait(calls, num_returns=len(calls), timeout=_SETTLE_S)[0] if calls else []
    returned: set[int] = set()
    died: dict[int, BaseException] = {}
    for call in done:
        try:
            ray.get(call)
            returned.add(pending[call])
        except DEATHS as error:
            died[pending[call]] = error
        except RayTaskError:
            continue
    return returned, died


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def raise_cause(error: RayTaskError, worker: int, method: str) -> NoReturn:
    """Raise the error that the worker raised, if it is one of ours, else an `EngineError` that carries it."""
    if isinstance(error.cause, R3Error):
        raise error.cause from error
    raise EngineError(f"rollout worker {worker} failed in `{method}`: {error.cause!r}") from error
