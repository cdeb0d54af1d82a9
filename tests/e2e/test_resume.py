"""A run that three signals stop ends where an uninterrupted one ends, and leaves no process behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3.run import read_rows
from tests.e2e.launch import SMALL, Started, started, status, steps

pytestmark = pytest.mark.e2e
STEPS = 7
DETERMINISTIC = ("run.deterministic=true", "rollout.dtype=float32")


def finish(run: Path, *arguments: str) -> None:
    with started(run, *arguments) as command:
        assert command.process.wait(timeout=300) == 0, command.output()
        command.require_nothing_left()


def fresh(run: Path, *overrides: str) -> tuple[str, ...]:
    return ("--config", "grpo_qwen3moe", f"run.dir={run}", f"run.steps={STEPS}", *SMALL, *overrides)


def comparable(run: Path) -> list[dict[str, Any]]:
    """The metrics of every step without wall times."""

    def timed(key: str) -> bool:
        return key.startswith("time/") or key.endswith(("_per_s", "/replay_s", "/put_s", "/get_s"))

    return [{k: v for k, v in row.items() if not timed(k)} for row in read_rows(run / "metrics.jsonl")]


def interrupt(command: Started) -> None:
    """What a terminal does on Ctrl-C: the signal goes to every process of the group."""
    os.killpg(command.process.pid, signal.SIGINT)


STOPS = (
    (2, interrupt, 130, "interrupted"),
    (4, lambda command: command.process.send_signal(signal.SIGTERM), 143, "interrupted"),
    (5, lambda command: command.process.kill(), -signal.SIGKILL, "running"),
)


@pytest.fixture(scope="module")
def uninterrupted(warm_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    finish(run, *fresh(run, *DETERMINISTIC))
    return run


def test_three_stops_change_nothing_and_leave_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = fresh(run, *DETERMINISTIC)
    for step, stop, code, state in STOPS:
        with started(run, *arguments) as command:
            command.wait_for_step(step)
            stop(command)
            assert command.process.wait(timeout=60) == code, command.output()
            command.require_nothing_left()
        assert steps(run)[-1] < STEPS
        assert status(run)["state"] == state
        assert status(run).get("exit_code", code) == code
        assert "Traceback" not in command.output()
        arguments = ("--resume", str(run))
    finish(run, *arguments)

    assert status(run)["state"] == "done"
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert comparable(run) == comparable(uninterrupted)
    weights = [path / "hf" / "model.safetensors" for path in (run, uninterrupted)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    resumed = [row["step"] for row in read_rows(run / "events.jsonl") if row["event"] == "resumed"]
    assert len(resumed) == 3
    assert resumed == sorted(resumed)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "LATEST", f"step-{STEPS - 1:08d}", f"step-{STEPS:08d}"
    ]  # fmt: skip


@pytest.mark.slow
def test_the_default_mode_resumes_without_a_jump(warm_model: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole" / "run", tmp_path / "cut" / "run"
    finish(whole, *fresh(whole, "run.steps=8"))
    finish(cut, *fresh(cut, "run.steps=4"))
    finish(cut, "--resume", str(cut), "run.steps=8")
    for key in ("rollout/reward_mean", "mismatch/k3"):
        expected, found = ([row[key] for row in read_rows(run / "metrics.jsonl")] for run in (whole, cut))
        spread = np.std(expected) + 1e-9
        assert np.abs(np.subtract(found, expected))[4:].max() < 4 * spread, key
