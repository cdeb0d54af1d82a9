"""The directory of one run: what is written there, and when, and what a resumed run finds."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r3.checkpoint import FOLDER, LOCK, replace_text
from r3.config import Config, load_config
from r3.errors import CheckpointError, ConfigError
from r3.tokens import TokenReport

RESOLVED = "config.resolved.yaml"
# What a run writes, and so what `--overwrite` deletes; anything else in the directory is the user's.
_OWN = (
    RESOLVED,
    "metrics.jsonl",
    "events.jsonl",
    "tokens.jsonl",
    "status.json",
    "curves.png",
    "expert_load.json",
    "hf",
    "wandb",
    "report.html",
    "report_png",
    FOLDER,
    "routing",
)
# What a saved state depends on: another value makes it the state of another run.
_FIXED = ("model.path", "trainer.processes", "trainer.dtype", "run.seed")


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Config, metrics, events, status, curves, trained model (`hf/`) and saved records (`routing/`) of one run.

    The caller holds `r3.checkpoint.run_lock` for as long as it writes.
    """

    path: Path

    @classmethod
    def create(cls, path: Path, config: Config, *, overwrite: bool = False) -> RunDirectory:
        """Make the directory and write the resolved config; raise `ConfigError` when it already holds something.

        `overwrite` deletes what an earlier run wrote there, and nothing else.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run.dir={path} cannot be made: {error.strerror}") from error
        if not overwrite:
            require_unused(path)
        for name in {entry.name for entry in path.iterdir()}.intersection(_OWN):
            own = path / name
            shutil.rmtree(own) if own.is_dir() else own.unlink()
        run = cls(path)
        (path / RESOLVED).write_text(config.to_yaml())
        run.write_status("starting")
        return run

    @classmethod
    def reopen(cls, path: Path, config: Config, step: int) -> RunDirectory:
        """Go back to the end of `step` in an existing run: later metrics are dropped, the changed keys are recorded.

        Raises `CheckpointError` for a changed key that the saved state depends on.
        """
        changed = changed_keys(load_config(path / RESOLVED), config)
        refused = [f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items() if key in _FIXED]
        if refused:
            raise CheckpointError(f"{path} cannot be resumed with another {'; '.join(refused)}; start a new run")
        run = cls(path)
        _keep_until(run.metrics, step)
        if run.tokens.exists():
            _keep_until(run.tokens, step)
        replace_text(path / RESOLVED, config.to_yaml())
        run.log_event("resumed", step=step, changed={key: list(values) for key, values in changed.items()})
        run.write_status("starting", resumed_from=step)
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
    def expert_load(self) -> Path:
        """Expert loads of the early steps, for `metrics.alarm_drift`."""
        return self.path / "expert_load.json"

    @property
    def tokens(self) -> Path:
        """One JSON object (`r3.tokens.TokenReport`) for every step that looked at single tokens."""
        return self.path / "tokens.jsonl"

    def routing(self, step: int) -> Path:
        """The routing records of one step, where `routing.save_every` saves them."""
        return self.path / "routing" / f"step-{step:08d}.r3"

    @property
    def curves(self) -> Path:
        """The picture of the run."""
        return self.path / "curves.png"

    def log_metrics(self, row: Mapping[str, float]) -> None:
        """Append one step to `metrics.jsonl`."""
        _append(self.metrics, row)

    def log_tokens(self, report: TokenReport) -> None:
        """Append what a step keeps of its tokens to `tokens.jsonl`."""
        _append(self.tokens, report.to_row())

    def log_event(self, kind: str, **facts: object) -> None:
        """Append one event (`canary`, `worker_replaced`, `sample_dropped`...) to `events.jsonl`."""
        _append(self.path / "events.jsonl", {"time": round(time.time(), 3), "event": kind, **facts})

    def last_event(self, kind: str) -> dict[str, Any] | None:
        """Return the last event of a kind, None without any."""
        events = self.path / "events.jsonl"
        found = [row for row in (read_rows(events) if events.exists() else []) if row["event"] == kind]
        return found[-1] if found else None

    def final_evaluation(self) -> float | None:
        """Return the held-out reward after the last step, or None when it was not measured."""
        event = self.last_event("final_evaluation")
        return None if event is None else event["eval/reward_mean"]

    def write_status(self, state: str, **facts: object) -> None:
        """Replace `status.json` atomically: a Ray job only reports success or failure, this file says which."""
        part = self.path / ".status.json.part"
        part.write_text(
            json.dumps({"state": state, "pid": os.getpid(), "time": round(time.time(), 3), **facts}, indent=1)
        )
        os.replace(part, self.path / "status.json")


def require_unused(path: Path) -> None:
    """Raise `ConfigError` when a run directory already holds something."""
    if path.is_dir() and {entry.name for entry in path.iterdir()} - {LOCK}:
        raise ConfigError(
            f"run.dir={path} is not empty; go on with --resume {path}, delete what is there with --overwrite, or "
            "choose another run.dir"
        )


def changed_keys(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """Return `key: (before, after)` of every key that differs, `run.dir` aside."""
    old, new = (config.model_dump(mode="json") for config in (before, after))
    return {
        f"{section}.{key}": (values.get(key), new[section][key])
        for section, values in old.items()
        for key in new[section]
        if values.get(key) != new[section][key] and (section, key) != ("run", "dir")
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a `.jsonl` file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def _keep_until(path: Path, step: int) -> None:
    """Drop the rows after `step`, and what a killed process left of its last line."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    replace_text(path, "".join(kept))


def _append(path: Path, row: Mapping[str, object]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
