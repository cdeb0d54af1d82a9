"""The directory of one run: what is written there, and when."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r3.config import Config
from r3.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """`config.resolved.yaml`, `metrics.jsonl`, `events.jsonl`, `status.json`, `curves.png` and `hf/` of one run."""

    path: Path

    @classmethod
    def create(cls, path: Path, config: Config) -> RunDirectory:
        """Make the directory and write the resolved config; raise `ConfigError` when it already holds something."""
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run.dir={path} cannot be made: {error.strerror}") from error
        if any(path.iterdir()):
            raise ConfigError(f"run.dir={path} is not empty; a run is never overwritten, choose another run.dir")
        run = cls(path)
        (path / "config.resolved.yaml").write_text(config.to_yaml())
        run.write_status("starting")
        return run

    @property
    def hf(self) -> Path:
        """The trained model as a Hugging Face checkpoint."""
        return self.path / "hf"

    @property
    def metrics(self) -> Path:
        """One JSON object per step."""
        return self.path / "metrics.jsonl"

    @property
    def curves(self) -> Path:
        """The picture of the run."""
        return self.path / "curves.png"

    def log_metrics(self, row: Mapping[str, float]) -> None:
        """Append one step to `metrics.jsonl`."""
        _append(self.metrics, row)

    def log_event(self, kind: str, **facts: object) -> None:
        """Append one event (`canary`, `worker_replaced`, `sample_dropped`...) to `events.jsonl`."""
        _append(self.path / "events.jsonl", {"time": round(time.time(), 3), "event": kind, **facts})

    def final_evaluation(self) -> float | None:
        """Return the held-out reward after the last step, or None when it was not measured."""
        events = self.path / "events.jsonl"
        rows = read_rows(events) if events.exists() else []
        found = [row["eval/reward_mean"] for row in rows if row["event"] == "final_evaluation"]
        return found[-1] if found else None

    def write_status(self, state: str, **facts: object) -> None:
        """Replace `status.json` atomically: a Ray job only reports success or failure, this file says which."""
        part = self.path / ".status.json.part"
        part.write_text(
            json.dumps({"state": state, "pid": os.getpid(), "time": round(time.time(), 3), **facts}, indent=1)
        )
        os.replace(part, self.path / "status.json")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a `.jsonl` file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def _append(path: Path, row: Mapping[str, object]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
