#!/usr/bin/env python
"""Make the runs and the pictures of docs/dashboard.md: a healthy run, one without replay, three whose records go wrong.

    python scripts/docs/dashboard.py runs DIR        # each about a minute and a half on two cores
    python scripts/docs/dashboard.py pictures DIR

The first writes DIR/healthy, DIR/off, DIR/shifted, DIR/swapped and DIR/foreign, `STEPS` steps of the default job each.
The bad records are well formed and begin with step 6 (`tests/corrupting_engine.py`). The second writes
docs/dashboard/.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from r3.report.figures import write_pngs
from r3.report.read import read_groups

ROOT = Path(__file__).resolve().parents[2]
STEPS = 10
BAD = ("routing.on_alarm=warn", "metrics.max_k3=1000")
RUNS = {
    "healthy": (),
    "off": ("replay.mode=none",),
    "shifted": ("rollout.engine=tests.corrupting_engine:LateShift", *BAD),
    "swapped": ("rollout.engine=tests.corrupting_engine:LateSwap", *BAD),
    "foreign": ("rollout.engine=tests.corrupting_engine:LateForeign", *BAD),
}
SHEETS = {
    "healthy": ("k3", "tail", "overlap", "shadow_layers_0"),
    "off": ("k3", "tail"),
    "shifted": ("k3", "overlap"),
    "swapped": ("overlap", "shadow_layers_0"),
    "foreign": ("k3", "overlap"),
}


def make_runs(folder: Path) -> None:
    """Train every run that is not there."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name, overrides in RUNS.items():
        if (folder / name).exists():
            continue
        command = [
            sys.executable, "-m", "r3.train", "--config", "grpo_qwen3moe", f"run.dir={folder / name}",
            f"run.steps={STEPS}", "run.eval_every=0", "run.checkpoint_every=0", "metrics.tokens_every=1", *overrides,
        ]  # fmt: skip
        subprocess.run(command, env=environment, cwd=ROOT, check=True)


def draw(folder: Path, target: Path) -> None:
    """Draw what the page shows of every run."""
    for name, plots in SHEETS.items():
        paths = [folder / "healthy", folder / name] if name == "off" else [folder / name]
        print(*write_pngs(read_groups(paths), target, {name: plots}), sep="\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("runs", "pictures"))
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "dashboard", help="folder of the pictures")
    options = parser.parse_args(arguments)
    if options.what == "runs":
        make_runs(options.folder.absolute())
    else:
        draw(options.folder, options.out)


if __name__ == "__main__":
    main()
