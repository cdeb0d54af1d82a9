"""The picture of one run: reward, mismatch with and without replay, router health, time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, float]
# Okabe-Ito: distinguishable with every common colour vision.
_BLUE, _ORANGE, _GREEN, _PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"


def draw_curves(rows: Sequence[Row], path: Path, final_eval: float | None = None) -> None:
    """Draw the rows of a `metrics.jsonl` as four panels into a PNG; without matplotlib say so once and draw nothing.

    `final_eval`: held-out reward after the last step, drawn behind it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logging.getLogger("r3").warning("no curves: pip install 'rollout-router-replay[plot]'")
        return
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    _reward(panels[0, 0], rows, final_eval)
    _mismatch(panels[0, 1], rows)
    _routers(panels[1, 0], rows)
    _time(panels[1, 1], rows)
    for panel in panels.flat:
        panel.set_xlabel("step")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _reward(panel: Any, rows: Sequence[Row], final_eval: float | None) -> None:
    panel.set(title="Reward", ylabel="mean reward", ylim=(0, 1))
    steps, values = _series(rows, "rollout/reward_mean")
    panel.plot(steps, values, color=_BLUE, alpha=0.3, linewidth=1)
    window = min(10, len(values))
    if window:
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        panel.plot(steps[window - 1 :], smooth, color=_BLUE, label=f"sampled, {window}-step mean")
    steps, values = _series(rows, "eval/reward_mean")
    if final_eval is not None:
        steps, values = np.append(steps, rows[-1]["step"] + 1), np.append(values, final_eval)
    panel.plot(steps, values, "o-", color=_ORANGE, label="held-out, greedy")


def _mismatch(panel: Any, rows: Sequence[Row]) -> None:
    panel.set(title="Log-prob difference, engine against trainer", ylabel="k3 [nats]", yscale="log")
    panel.plot(*_series(rows, "mismatch/k3"), color=_BLUE, label="as trained")
    panel.plot(*_series(rows, "mismatch_native/k3"), "s--", color=_ORANGE, label="same batch, no replay")


def _routers(panel: Any, rows: Sequence[Row]) -> None:
    panel.set(title="Routers that disagree", ylabel="share of (token, layer) pairs")
    panel.plot(*_series(rows, "router/shadow_disagree_token_layer"), color=_GREEN, label="inside the replayed pass")
    panel.plot(*_series(rows, "router/native_disagree_token_layer"), "s--", color=_PURPLE, label="without replay")


def _time(panel: Any, rows: Sequence[Row]) -> None:
    panel.set(title="Time of a step", ylabel="seconds")
    parts = ("time/generate_s", "time/train_s", "time/weights_s")
    complete = [row for row in rows if all(part in row for part in parts)]
    if complete:
        panel.stackplot(
            [row["step"] for row in complete],
            *[[row[part] for row in complete] for part in parts],
            labels=["generate", "train", "weights"],
            colors=[_BLUE, _ORANGE, _GREEN],
            alpha=0.7,
        )


def _series(rows: Sequence[Row], key: str) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    present = [row for row in rows if key in row]
    return np.array([row["step"] for row in present]), np.array([row[key] for row in present])
