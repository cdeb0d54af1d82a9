"""Start the command as a process of its own, watch it, and see what it leaves running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "R3_TEST_MARK"
# One step in about a second; a checkpoint after each.
SMALL = (
    "rollout.prompts_per_step=8",
    "grpo.group_size=4",
    "run.eval_every=2",
    "task.eval_prompts=8",
    "metrics.counterfactual_every=2",
    "run.checkpoint_every=1",
)


@dataclass(frozen=True)
class Started:
    """A running command; `mark` is in the environment of all its descendants."""

    process: subprocess.Popen[str]
    run: Path
    mark: str

    def wait_for_step(self, step: int, timeout: float = 480) -> None:
        """Wait until the metrics of a step are written."""

        def reached() -> bool:
            code = self.process.poll()
            assert code is None or steps(self.run)[-1:] >= [step], f"ended early with {code}: {self.output()}"
            return bool(steps(self.run)) and steps(self.run)[-1] >= step

        wait_until(reached, timeout, f"step {step}")

    def output(self) -> str:
        """Return what the command has printed."""
        return (self.run.parent / "output.txt").read_text()

    def require_nothing_left(self, timeout: float = 180) -> None:
        """Wait until no descendant is left."""
        wait_until(lambda: not processes(self.mark), timeout, lambda: f"the end of {processes(self.mark)}")


@contextmanager
def started(run: Path, *arguments: str, **environment: str) -> Iterator[Started]:
    """Run the command in a session of its own; whatever is left of it at the end is killed."""
    mark = uuid.uuid4().hex
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Inherited where the tests run in a shell's background, and the command would inherit it again.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run.parent.mkdir(parents=True, exist_ok=True)
    with (run.parent / "output.txt").open("a") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "r3.train", *arguments],
            env=child_environment(mark, **environment), stdout=output, stderr=output, text=True, start_new_session=True,
        )  # fmt: skip
    try:
        yield Started(process, run, mark)
    finally:
        kill(mark)
        process.wait(timeout=30)


def child_environment(mark: str, **changes: str) -> dict[str, str]:
    """Return our environment without a Ray cluster, with the mark."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    # `ray start` asks for a token by default; a token file would lie in the home directory of whoever runs the tests.
    auth = {"RAY_AUTH_MODE": "disabled"}
    # A job's entry point says `python`: the one that runs the tests.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {
        **kept,
        **auth,
        "PATH": path,
        "RAY_USAGE_STATS_ENABLED": "0",
        "WANDB_MODE": "offline",
        MARK: mark,
        **changes,
    }


def steps(run: Path) -> list[int]:
    """Return the steps whose metrics are complete on disk."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def status(run: Path) -> dict[str, Any]:
    """Return the contents of `status.json`."""
    found: dict[str, Any] = json.loads((run / "status.json").read_text())
    return found


def processes(mark: str) -> dict[int, str]:
    """Return `pid: command line` of every live process that inherited the mark."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            marked = f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0")
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (OSError, PermissionError):
            continue
        if marked and line:
            found[int(entry.name)] = line[:120]
    return found


def kill(mark: str) -> None:
    """Kill every process that inherited the mark."""
    for pid in processes(mark):
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            continue


def wait_until(condition: Callable[[], bool], timeout: float, what: str | Callable[[], str]) -> None:
    """Poll a condition; fail with its name when it does not come true in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout} s: {what if isinstance(what, str) else what()}"
        time.sleep(0.1)
