"""A run that three signals stop ends where an uninterrupted one ends, and leaves no process behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3.run import read_rows
from tests.e2e.launch import SMALL, Started, started, status, steps

pytestmark = pytest.mark.e2e
DETERMINISTIC = ("run.deterministic=true", "rollout.dtype=float32")


def finish(run: Path, *arguments: str) -> None:
    with started(run, *arguments) as command:
        assert command.process.wait(timeout=300) == 0, command.output()
        command.require_nothing_left()


def fresh(run: Path, total: int, *overrides: str) -> tuple[str, ...]:
    return ("--config", "grpo_qwen3moe", f"run.dir={run}", f"run.steps={total}", *SMALL, *overrides)


def comparable(run: Path) -> list[dict[str, Any]]:
    """The metrics of every step without wall times."""

    def timed(key: str) -> bool:
        return key.startswith("time/") or key.endswith("_s")

    return [{k: v for k, v in row.items() if not timed(k)} for row in read_rows(run / "metrics.jsonl")]


def interrupt(command: Started) -> None:
    """What a terminal does on Ctrl-C: the signal goes to every process of the group."""
    os.killpg(command.process.pid, signal.SIGINT)


KILL = (lambda command: command.process.kill(), -signal.SIGKILL, "running")
TERMINATE = (lambda command: command.process.send_signal(signal.SIGTERM), 143, "interrupted")
INTERRUPT = (interrupt, 130, "interrupted")


@pytest.mark.parametrize(
    ("total", "stops"),
    [
        pytest.param(4, ((2, *KILL),), id="killed", marks=pytest.mark.slow),
        pytest.param(7, ((2, *INTERRUPT), (4, *TERMINATE), (5, *KILL)), id="three stops", marks=pytest.mark.slow),
    ],
)
def test_stops_change_nothing_and_leave_nothing(
    total: int, stops: tuple[tuple[int, Callable[[Started], None], int, str], ...], warm_model: Path, tmp_path: Path
) -> None:
    uninterrupted, run = tmp_path / "whole" / "run", tmp_path / "run"
    finish(uninterrupted, *fresh(uninterrupted, total, *DETERMINISTIC))
    arguments = fresh(run, total, *DETERMINISTIC)
    for step, stop, code, state in stops:
        with started(run, *arguments) as command:
            command.wait_for_step(step)
            stop(command)
            assert command.process.wait(timeout=60) == code, command.output()
            command.require_nothing_left()
        assert steps(run)[-1] < total
        assert status(run)["state"] == state
        assert status(run).get("exit_code", code) == code
        assert "Traceback" not in command.output()
        arguments = ("--resume", str(run))
    finish(run, *arguments)

    assert status(run)["state"] == "done"
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == list(range(1, total + 1))
    assert comparable(run) == comparable(uninterrupted)
    weights = [path / "hf" / "model.safetensors" for path in (run, uninterrupted)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    resumed = [row["step"] for row in read_rows(run / "events.jsonl") if row["event"] == "resumed"]
    assert len(resumed) == len(stops)
    assert resumed == sorted(resumed)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "LATEST", f"step-{total - 1:08d}", f"step-{total:08d}"
    ]  # fmt: skip


@pytest.mark.slow
def test_the_default_mode_resumes_without_a_jump(warm_model: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole" / "run", tmp_path / "cut" / "run"
    finish(whole, *fresh(whole, 8))
    finish(cut, *fresh(cut, 4))
    finish(cut, "--resume", str(cut), "run.steps=8")
    for key in ("rollout/reward_mean", "mismatch/k3"):
        expected, found = ([row[key] for row in read_rows(run / "metrics.jsonl")] for run in (whole, cut))
        spread = np.std(expected) + 1e-9
        assert np.abs(np.subtract(found, expected))[4:].max() < 4 * spread, key
