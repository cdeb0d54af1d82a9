"""What a run that a signal ends is called, whatever the signal's exception has become on its way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from r3 import train
from r3.config import Config
from r3.errors import EngineError
from r3.interrupt import Sigterm, Terminated
from r3.run import RunDirectory
from tests.e2e.launch import status


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def wrapped() -> None:
    """What Ray 2.60 made of a handler's exception that was no KeyboardInterrupt."""
    try:
        terminate()
    except Terminated as error:
        raise SystemError("returned a result with an exception set") from error


def replaced() -> None:
    """What Ray makes of a KeyboardInterrupt in a wait: a new one, without a cause."""
    with suppress(Terminated):
        terminate()
    raise KeyboardInterrupt


def in_the_clean_up() -> None:
    try:
        terminate()
    finally:
        raise EngineError("the actor is gone")


def unrelated() -> None:
    raise SystemError("returned a result with an exception set")


def from_the_keyboard() -> None:
    raise KeyboardInterrupt


def fails() -> None:
    raise EngineError("no engine")


@pytest.mark.parametrize(
    ("body", "code", "state"),
    [
        (terminate, 143, "interrupted"),
        (wrapped, 143, "interrupted"),
        (replaced, 143, "interrupted"),
        (in_the_clean_up, 143, "interrupted"),
        (from_the_keyboard, 130, "interrupted"),
        (fails, 4, "failed"),
        (unrelated, 1, "failed"),
    ],
)
def test_the_command_ends_as_its_signal_says(
    body: Callable[[], None], code: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made_up(config: Config, run: RunDirectory, *_: object) -> None:
        body()

    monkeypatch.setattr(train, "_train", made_up)
    before, run = signal.getsignal(signal.SIGTERM), tmp_path / "run"
    command = ["--config", "grpo_qwen3moe", f"run.dir={run}"]
    if body is unrelated:
        with pytest.raises(SystemError, match="exception set"):
            train.main(command)
    else:
        assert train.main(command) == code
    found = status(run)
    assert (found["state"], found["exit_code"]) == (state, code)
    assert found["error"].startswith("Terminated: ") == (code == 143)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_does_not_interrupt_the_clean_up() -> None:
    cleaned = []

    def killed_twice() -> None:
        try:
            terminate()
        finally:
            terminate()
            cleaned.append(True)

    with pytest.raises(Terminated), Sigterm().raised():
        killed_twice()
    assert cleaned
