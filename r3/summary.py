"""What a run says when it ends: reward before and after, and the mismatch with and without replay side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Row = dict[str, float]
_WINDOW = 10
_EXTREMES = (
    ("coverage, minimum", "router/coverage", min, "{:g}"),
    ("mismatched ids, maximum", "router/mismatched_ids", max, "{:g}"),
    ("step time, median", "time/step_s", np.median, "{:.2f} s"),
)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the closing summary: a name and its value as text."""

    name: str
    value: str


def summarise(rows: Sequence[Row], final_eval: float | None) -> list[Line]:
    """Return the closing summary of a run from its `metrics.jsonl` rows and the evaluation after the last step."""
    lines = [Line("steps", str(len(rows)))]
    rewards = _column(rows, "rollout/reward_mean")
    if len(rewards):
        window = min(_WINDOW, len(rewards))
        first, last = rewards[:window].mean(), rewards[-window:].mean()
        lines.append(Line(f"sampled reward, {window}-step means", f"{first:.3f} -> {last:.3f} ({last - first:+.3f})"))
    evals = _column(rows, "eval/reward_mean")
    if len(evals) and final_eval is not None:
        lines.append(
            Line("held-out greedy reward", f"{evals[0]:.3f} -> {final_eval:.3f} ({final_eval - evals[0]:+.3f})")
        )
    lines += _mismatch(rows)
    for name, key, reduce, form in _EXTREMES:
        values = _column(rows, key)
        if len(values):
            lines.append(Line(name, form.format(reduce(values))))
    return lines


def _mismatch(rows: Sequence[Row]) -> list[Line]:
    """Both means run over the steps that measured both, so that they describe the same batches."""
    both = [row for row in rows if "mismatch/k3" in row and "mismatch_native/k3" in row]
    if not both:
        return []
    lines = []
    for key in ("k3", "extreme_1p5"):
        replayed = float(np.mean([row[f"mismatch/{key}"] for row in both]))
        native = float(np.mean([row[f"mismatch_native/{key}"] for row in both]))
        ratio = f"{native / replayed:.1f}x" if replayed else "replay: none"
        lines.append(
            Line(
                f"{key}, mean over {len(both)} steps with both",
                f"replay {replayed:.3g} | native {native:.3g} ({ratio})",
            )
        )
    return lines


def _column(rows: Sequence[Row], key: str) -> np.ndarray:  # type: ignore[type-arg]
    return np.array([row[key] for row in rows if key in row])
