"""The form of docs/benchmarks/*.json: rows with ratios and intervals, the host, versions and commit that made them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r3.environment import commit, versions

ROOT = Path(__file__).resolve().parents[2]
_RESAMPLES = 10_000

Row = dict[str, Any]


def row(
    name: str, value: float, unit: str, baseline: str = "", ratio: float | None = None, ci95: Sequence[float] = ()
) -> Row:
    """Return a row: `value` in `unit`, its `ratio` to the row `baseline`, and the interval of what is last of them."""
    return {
        "name": name,
        "value": _rounded(value),
        "unit": unit,
        "baseline": baseline,
        "ratio": None if ratio is None else _rounded(ratio),
        "ci95": [_rounded(bound) for bound in ci95],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def bootstrap(
    values: Sequence[float], below: Sequence[float] | None = None, middle: Callable[..., Any] = np.mean
) -> tuple[float, tuple[float, ...]]:
    """Return the mean of `values` (over that of `below`, in pairs) and its 95 % percentile interval over resamples.

    `middle`: `np.median` for medians in the place of means.

    No interval from fewer than three values, nor of a ratio whose divisor is 0 in some resample.
    """
    parts = [np.asarray(part, np.float64) for part in (values, below) if part is not None]

    def of(sums: list[Any]) -> Any:
        return sums[0] if len(sums) == 1 else sums[0] / sums[1]

    value = float(of([middle(part) for part in parts]))
    if len(values) < 3:
        return value, ()
    drawn = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    resampled = [middle(part[drawn], axis=1) for part in parts]
    if len(resampled) == 2 and not resampled[1].all():
        return value, ()
    low, high = np.percentile(of(resampled), [2.5, 97.5])
    return value, (float(low), float(high))


def environment(**facts: Any) -> Row:
    """Return host, versions and commit of this process, and `facts`."""
    import torch

    gpus = torch.cuda.device_count()
    host = f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else "no GPU"
    return {
        "host": f"{host}, {os.cpu_count()} cores, {platform.machine()}",
        "versions": versions(),
        "commit": commit() or "unknown",
    } | facts


def show(rows: Sequence[Row]) -> None:
    """Print a table's values, ratios and intervals, a row a line."""
    name, unit = (max(len(one[key]) for one in rows) for key in ("name", "unit"))
    for one in rows:
        ratio = "" if one["ratio"] is None else f"{one['ratio']:.4f}"
        print(
            f"{one['name']:<{name}} {one['value']:>12g} {one['unit']:<{unit}} {ratio:>8} {one['ci95'] or ''}".rstrip()
        )


def write(file: Path, made: Row, rows: Sequence[Row]) -> None:
    """Replace `file` by `{"environment": ..., "rows": [...]}`, a row a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(one) for one in rows)
    part = file.with_name(f".{file.name}.part")
    part.write_text(f'{{"environment": {json.dumps(made)},\n "rows": [\n  {lines}\n ]}}\n')
    os.replace(part, file)
