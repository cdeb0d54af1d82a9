"""Ends a rollout worker whose SGLang processes have died, also where SGLang itself does not come to it.

SGLang (0.5.17 and 0.5.23, `SubprocessWatchdog`) tells its own process of a death with SIGQUIT. From the first request
on the handler belongs to the event loop, which does not run in `Engine.collective_rpc`: that waits for the dead without
an end. An error in the waiting call instead would leave an engine that is of no use; the pool replaces dead workers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any

from r3.errors import EngineError

# SGLang looks at its processes every second; where its loop runs, its own handler ends the worker within this time.
_GRACE_S = 3.0


@dataclass(frozen=True, slots=True)
class Death:
    """A process that has ended; `exit_code` is minus its signal, and None where somebody else collected it."""

    name: str
    pid: int | None
    exit_code: int | None


class Watch:
    """Waits for the first end of a process, in a thread of its own."""

    def __init__(
        self, processes: Mapping[str, BaseProcess], on_death: Callable[[Death], None], grace_s: float = _GRACE_S
    ) -> None:
        """Begin; `on_death` is called once, in that thread, `grace_s` after the first of the named processes ended."""
        self._processes = {process.sentinel: (name, process) for name, process in processes.items()}
        self._on_death = on_death
        self._grace_s = grace_s
        self._woken, self._wake = Pipe(duplex=False)
        self._thread = Thread(target=self._run, name="r3-sglang-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watch: after this returns `on_death` is not called. Safe to call twice."""
        if not self._wake.closed:
            self._wake.send_bytes(b"stop")
            self._thread.join()
            self._wake.close()
            self._woken.close()

    def _run(self) -> None:
        ended = wait([self._woken, *self._processes])
        if self._woken in ended or wait([self._woken], timeout=self._grace_s):
            return
        name, process = next(self._processes[sentinel] for sentinel in self._processes if sentinel in ended)
        # The sentinel falls a moment before there is an exit code.
        process.join(timeout=1.0)
        self._on_death(Death(name, process.pid, process.exitcode))


def watch_engine(engine: Any, name: str, grace_s: float = _GRACE_S) -> Watch:
    """Watch the processes of an `sglang.Engine`; the death of one of them ends this process and all of its children.

    An end that SGLang itself has begun (`Engine.shutdown`, also at the exit of the interpreter, or SIGTERM) is none.
    Raises `EngineError` where SGLang does not say which processes it has.
    """
    try:
        watchdog = engine.tokenizer_manager._subprocess_watchdog
        processes = dict(zip(watchdog._names, watchdog._processes, strict=True))
        ending = watchdog._stop_event
    except AttributeError as error:
        raise EngineError(
            f"{name} does not hold its processes where 0.5.17 and 0.5.23 do, so that the death of one would not be "
            f"seen ({error}); install one of these releases"
        ) from error

    def on_death(death: Death) -> None:
        # SGLang stops its own watchdog before it ends its processes; an engine whose process failed never gets there.
        if not ending.is_set():
            _end_this_process(name, death)

    return Watch(processes, on_death, grace_s)


def _end_this_process(engine: str, death: Death) -> None:
    """End this process as SGLang's own handler does: by SIGKILL, after its children."""
    from sglang.srt.utils import kill_process_tree

    code = "unknown" if death.exit_code is None else death.exit_code
    print(
        f"{engine}: process {death.name} (pid {death.pid}) ended with exit code {code} while the engine was in use; "
        "this rollout worker ends with it",
        file=sys.stderr,
        flush=True,
    )
    kill_process_tree(os.getpid())
