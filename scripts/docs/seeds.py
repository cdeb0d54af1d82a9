#!/usr/bin/env python
"""Compare runs with and without replay over seeds: print a Markdown table, draw docs/seeds.png.

    python scripts/docs/seeds.py RUN [RUN ...]

Every RUN is the directory of a finished run; seed and `replay.mode` are read from its `config.resolved.yaml`. The first
column of numbers is the sampled reward, as means of the first and of the last ten steps; k3 and the share of tokens
whose ratio leaves [1/1.5, 1.5] are means over all steps, as trained; native k3 is the mean over the steps that also
measured the pass without replay.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure

from r3.run import RunDirectory, read_rows

ROOT = Path(__file__).resolve().parents[2]
HEAD = ("seed", "replay", "sampled reward", "held-out greedy reward", "k3", "beyond ratio 1.5", "native k3")
# Okabe-Ito, as in `r3.curves`.
COLORS = {"r3": "#0072B2", "none": "#D55E00"}
NAMES = {"r3": "with replay", "none": "without"}


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run: seed, replay mode, rows of its metrics, held-out reward after the last step."""

    seed: int
    mode: str
    rows: Sequence[dict[str, Any]]
    final_eval: float | None

    @classmethod
    def read(cls, path: Path) -> Run:
        config = yaml.safe_load((path / "config.resolved.yaml").read_text())
        run = RunDirectory(path)
        return cls(config["run"]["seed"], config["replay"]["mode"], read_rows(run.metrics), run.final_evaluation())

    def column(self, key: str) -> np.ndarray:
        return np.array([row[key] for row in self.rows if key in row])

    def cells(self) -> list[str]:
        reward, native = self.column("rollout/reward_mean"), self.column("mismatch_native/k3")
        return [
            str(self.seed),
            self.mode,
            f"{reward[:10].mean():.3f} to {reward[-10:].mean():.3f}",
            f"{self.column('eval/reward_mean')[0]:.3f} to {self.final_eval:.3f}",
            f"{self.column('mismatch/k3').mean():.2e}",
            f"{self.column('mismatch/extreme_1p5').mean():.1e}",
            f"{native.mean():.2e}" if len(native) else "",
        ]


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw reward and k3 of both arms, ten-step means: every seed as a thin line, their mean as a thick one."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, key, title, unit in (
        (panels[0], "rollout/reward_mean", "Sampled reward", "mean reward"),
        (panels[1], "mismatch/k3", "Log-prob difference, engine against trainer", "k3 [nats]"),
    ):
        for mode in COLORS:
            curves = [np.convolve(run.column(key), np.ones(10) / 10, "valid") for run in runs if run.mode == mode]
            for curve in curves:
                panel.plot(np.arange(len(curve)) + 10, curve, color=COLORS[mode], alpha=0.3, linewidth=1)
            if curves:
                mean, label = np.mean(curves, axis=0), f"{NAMES[mode]}, {len(curves)} seeds"
                panel.plot(np.arange(len(mean)) + 10, mean, color=COLORS[mode], linewidth=2.5, label=label)
        panel.set(title=title, xlabel="step (10-step means)", ylabel=unit)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    panels[1].set_yscale("log")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "seeds.png", metavar="FILE")
    options = parser.parse_args()
    runs = sorted((Run.read(path) for path in options.runs), key=lambda run: (run.seed, run.mode != "r3"))
    print("| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD), sep="\n")
    for run in runs:
        print("| " + " | ".join(run.cells()) + " |")
    draw(runs, options.plot)


if __name__ == "__main__":
    main()
