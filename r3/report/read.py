"""What run directories hold, also while they are written; runs that differ in their seed alone are one group."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from r3.errors import ConfigError
from r3.run import RESOLVED, RunDirectory
from r3.tokens import TokenReport

Floats = NDArray[np.float64]
ENDED = ("done", "failed", "interrupted")
# Sections that do not change what is computed.
_APART = ("run", "tracking")


@dataclass(frozen=True, slots=True)
class Run:
    """One run directory. `config`: resolved, as plain values; `rows`, `events`: of the `.jsonl` files."""

    path: Path
    config: dict[str, Any]
    status: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    events: tuple[dict[str, Any], ...]
    tokens: tuple[TokenReport, ...]

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read a run directory; raise `ConfigError` when it is none."""
        if not (path / RESOLVED).is_file():
            raise ConfigError(f"{path} is no run directory: {RESOLVED} is missing")
        run, status = RunDirectory(path), path / "status.json"
        return cls(
            path=path,
            config=yaml.safe_load((path / RESOLVED).read_text()),
            status=json.loads(status.read_text()) if status.exists() else {},
            rows=tuple(_whole_rows(run.metrics)),
            events=tuple(_whole_rows(path / "events.jsonl")),
            tokens=tuple(TokenReport.from_row(row) for row in _whole_rows(run.tokens)),
        )

    @property
    def name(self) -> str:
        """Name of the directory."""
        return self.path.resolve().name

    @property
    def state(self) -> str:
        """What `status.json` says: `starting`, `running`, or one of `ENDED`."""
        return str(self.status.get("state", "unknown"))

    @property
    def final_eval(self) -> float | None:
        """Held-out reward after the last step."""
        found = [event["eval/reward_mean"] for event in self.events if event["event"] == "final_evaluation"]
        return found[-1] if found else None

    def alarms(self) -> list[dict[str, Any]]:
        """Return the alarm events, in order."""
        return [event for event in self.events if str(event["event"]).endswith("alarm")]

    def series(self, key: str) -> tuple[Floats, Floats]:
        """Return steps and values of a metric, where it was measured and is finite."""
        found = [(row["step"], row[key]) for row in self.rows if key in row and np.isfinite(row[key])]
        steps, values = np.array(found, np.float64).reshape(-1, 2).T
        if key == "eval/reward_mean" and self.final_eval is not None and self.rows:
            steps, values = np.append(steps, self.rows[-1]["step"] + 1), np.append(values, self.final_eval)
        return steps, values


@dataclass(frozen=True, slots=True)
class Group:
    """Runs of one configuration that differ in their seed; `label` says what sets it apart from the other groups."""

    label: str
    runs: tuple[Run, ...]

    def band(self, key: str, smooth: int = 1) -> tuple[Floats, Floats]:
        """Return steps `[s]` and values `[runs, s]` where every run with the metric has it.

        `smooth`: each value is the mean of that many up to its step; shorter series stay as they are.
        """
        series = [run.series(key) for run in self.runs]
        series = [(steps, values) for steps, values in series if len(steps)]
        if not series:
            return np.empty(0), np.empty((0, 0))
        common = series[0][0]
        for steps, _ in series[1:]:
            common = np.intersect1d(common, steps)
        values = np.stack([found[np.isin(steps, common)] for steps, found in series])
        if smooth > 1 and values.shape[1] >= 2 * smooth:
            kernel = np.ones(smooth) / smooth
            values = np.stack([np.convolve(row, kernel, "valid") for row in values])
            common = common[smooth - 1 :]
        return common, values


def read_groups(paths: Sequence[Path]) -> tuple[Group, ...]:
    """Read run directories and group them; raise `ConfigError` for one that is none."""
    runs = [Run.read(path) for path in paths]
    keyed: dict[str, list[Run]] = {}
    for run in runs:
        keyed.setdefault(json.dumps(_flat(run.config), sort_keys=True, default=str), []).append(run)
    groups = list(keyed.values())
    flat = [_flat(group[0].config) for group in groups]
    differing = sorted(key for key in set().union(*flat) if len({str(one.get(key)) for one in flat}) > 1)
    return tuple(Group(_label(group, one, differing), tuple(group)) for group, one in zip(groups, flat, strict=True))


def _label(group: Sequence[Run], flat: dict[str, Any], differing: Sequence[str]) -> str:
    if not differing or len(differing) > 2:
        name = group[0].name
    else:
        name = ", ".join(f"{key}={flat.get(key)}" for key in differing)
    return name if len(group) == 1 else f"{name} ({len(group)} seeds)"


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, values in config.items()
        if section not in _APART
        for key, value in values.items()
    }


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a `.jsonl` file that a run may be writing: a line without its end is not there yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
