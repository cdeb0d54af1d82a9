"""The commands as a user runs them: in a process of their own, from a directory of the test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_module(
    module: str, *arguments: str | Path, cwd: Path = ROOT, path: tuple[str | Path, ...] = (ROOT,), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENTS` with `path` as PYTHONPATH, offline, and return what it said."""
    clean = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "PYTHONPATH")}
    extra = {"PYTHONPATH": os.pathsep.join(map(str, path)), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd, env=clean | extra | environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def refused(result: subprocess.CompletedProcess[str], code: int, *messages: str) -> None:
    """Assert that a command ended with `code`, said every message on stderr, and showed no traceback."""
    assert result.returncode == code, result.stderr + result.stdout
    for message in messages:
        assert message in result.stderr
    assert "Traceback" not in result.stderr
