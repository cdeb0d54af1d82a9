"""What becomes of a process of the engine that ends, with real small processes and without SGLang."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from queue import Queue
from threading import Event
from time import sleep
from types import SimpleNamespace
from typing import Any

import pytest

from r3.errors import EngineError
from r3.rollout.engines.sglang_watch import Death, Watch, watch_engine

LIMIT_S = 60.0  # of a wait for what must happen
NEVER_S = 3600.0

Spawn = Callable[..., BaseProcess]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Return a function that starts a process of a builtin function, as SGLang starts its own."""
    started: list[BaseProcess] = []

    def start(target: Callable[[Any], Any], argument: float) -> BaseProcess:
        process = get_context("spawn").Process(target=target, args=(argument,))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Queue[int]:
    """Stand in for SGLang's function that ends a process and its children; return the ids that it was given."""
    asked: Queue[int] = Queue()
    for name in ("sglang", "sglang.srt"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "sglang.srt.utils", SimpleNamespace(kill_process_tree=asked.put))
    return asked


def engine_of(*processes: BaseProcess) -> Any:
    """`sglang.Engine`, as far as the watch looks at it."""
    names = [f"scheduler_{i}" for i in range(len(processes))]
    watchdog = SimpleNamespace(_processes=list(processes), _names=names, _stop_event=Event())
    return SimpleNamespace(tokenizer_manager=SimpleNamespace(_subprocess_watchdog=watchdog))


def test_an_end_is_told_with_name_id_and_exit_code(spawn: Spawn) -> None:
    deaths: Queue[Death] = Queue()
    lives, dies = spawn(sleep, NEVER_S), spawn(sleep, NEVER_S)
    watch = Watch({"scheduler_0": lives, "scheduler_1": dies}, deaths.put, grace_s=0)
    dies.kill()

    assert deaths.get(timeout=LIMIT_S) == Death("scheduler_1", dies.pid, -9)
    watch.stop()
    lives.kill()
    lives.join()
    assert deaths.empty(), "told once"


@pytest.mark.parametrize("code", [0, 7])
def test_a_process_that_had_ended_before_is_told_too(spawn: Spawn, code: int) -> None:
    deaths: Queue[Death] = Queue()
    process = spawn(os._exit, code)
    process.join()
    watch = Watch({"scheduler_0": process}, deaths.put, grace_s=0)

    assert deaths.get(timeout=LIMIT_S) == Death("scheduler_0", process.pid, code)
    watch.stop()


@pytest.mark.parametrize("when", ["before", "in the grace"])
def test_an_end_that_is_wanted_is_not_told(spawn: Spawn, when: str) -> None:
    deaths: Queue[Death] = Queue()
    process = spawn(sleep, NEVER_S)
    watch = Watch({"scheduler_0": process}, deaths.put, grace_s=0 if when == "before" else NEVER_S)
    if when == "before":
        watch.stop()
    process.kill()
    process.join()
    watch.stop()

    assert not watch._thread.is_alive(), "it could still tell"
    assert deaths.empty()


def test_the_death_of_an_engines_process_ends_this_one_with_a_word(
    spawn: Spawn, killed: Queue[int], capfd: pytest.CaptureFixture[str]
) -> None:
    lives, dies = spawn(sleep, NEVER_S), spawn(sleep, NEVER_S)
    watch = watch_engine(engine_of(lives, dies), "sglang 0.5.23", grace_s=0)
    dies.kill()

    assert killed.get(timeout=LIMIT_S) == os.getpid()
    watch.stop()
    assert f"sglang 0.5.23: process scheduler_1 (pid {dies.pid}) ended with exit code -9" in capfd.readouterr().err


def test_an_end_that_sglang_began_itself_ends_nothing(
    spawn: Spawn, killed: Queue[int], capfd: pytest.CaptureFixture[str]
) -> None:
    process = spawn(sleep, NEVER_S)
    engine = engine_of(process)
    watch = watch_engine(engine, "sglang 0.5.23", grace_s=0)
    engine.tokenizer_manager._subprocess_watchdog._stop_event.set()  # as `Engine.shutdown` does first
    process.kill()
    watch._thread.join(LIMIT_S)

    assert not watch._thread.is_alive()
    watch.stop()
    assert killed.empty()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("missing", ["_processes", "_names", "_stop_event"])
def test_a_release_that_keeps_its_processes_elsewhere_is_refused(missing: str) -> None:
    engine = engine_of()
    delattr(engine.tokenizer_manager._subprocess_watchdog, missing)
    with pytest.raises(EngineError, match=f"sglang 0.5.99 does not hold its processes .*{missing}"):
        watch_engine(engine, "sglang 0.5.99")
