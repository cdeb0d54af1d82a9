"""SIGTERM while the driver waits for an actor: the wait ends at once, and the run ends as a terminated one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from r3.interrupt import Sigterm

pytestmark = pytest.mark.ray


class Terminator:
    """Sends a SIGTERM and is busy for good, so that a wait that goes on after the signal never ends."""

    def terminate(self, pid: int) -> None:
        os.kill(pid, signal.SIGTERM)
        threading.Event().wait()


@pytest.mark.parametrize("wait", ["wait", "get"])
def test_sigterm_ends_a_wait_for_a_busy_actor(wait: str, ray_session: None) -> None:
    import ray

    waits: dict[str, Callable[[Any], object]] = {
        "wait": lambda call: ray.wait([call], timeout=120),
        "get": lambda call: ray.get(call, timeout=120),
    }
    actor, sigterm = ray.remote(Terminator).options(num_cpus=0).remote(), Sigterm()
    try:
        with pytest.raises(KeyboardInterrupt) as caught, sigterm.raised():
            waits[wait](actor.terminate.remote(os.getpid()))
        assert sigterm.exit_code(caught.value) == 143
        assert sigterm.name(caught.value).startswith("Terminated")
    finally:
        ray.kill(actor)
