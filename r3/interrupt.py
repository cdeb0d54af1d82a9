"""SIGTERM ends a run as Ctrl-C does: as an exception, so that every actor is closed on the way out."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception.

    A KeyboardInterrupt, because Ray ends a wait at that alone, with a KeyboardInterrupt of its own in its place. At
    another exception of a signal handler it waits on, and then says `SystemError: ... returned a result with an
    exception set` (seen with Ray 2.60).
    """


class Sigterm:
    """SIGTERM in this process: raised as `Terminated`, and remembered, as what comes out may be another exception."""

    def __init__(self) -> None:
        self._came = False

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Raise `Terminated` in the main thread at the first SIGTERM; later ones are ignored."""

        def handler(number: int, frame: FrameType | None) -> None:
            # A second signal must not interrupt the clean-up that the first one started.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._came = True
            raise Terminated("SIGTERM")

        previous = signal.signal(signal.SIGTERM, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def exit_code(self, error: BaseException) -> int:
        """Return the exit code of a run that `error` ends: 143 or 130 where a signal is among its causes."""
        if any(isinstance(cause, KeyboardInterrupt) for cause in _causes(error)):
            return 143 if self._came else 130
        return int(getattr(error, "exit_code", 1))

    def name(self, error: BaseException) -> str:
        """Return `error` in words; what Ray or anything else made of a SIGTERM is named after that as well."""
        said = ": ".join(filter(None, (type(error).__name__, str(error))))
        return f"Terminated: {said}" if self.exit_code(error) == 143 and not isinstance(error, Terminated) else said


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield `error` and what led to it, as a traceback shows it."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        yield found
        seen.add(id(found))
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
