#!/usr/bin/env python
"""Measure every parallel layout against the single process and print the table of docs/layouts.md.

    python scripts/bench/layouts.py                      two processes
    python scripts/bench/layouts.py --large              four processes
    python scripts/bench/layouts.py --layouts tp2 cp2    some of them

Each row is one log-prob pass and one update on 12 random trajectories with random records: recorded ids that were not
used, difference of the loss, worst difference of a gradient tensor relative to its largest element. bfloat16 rows are
compared with a single process in bfloat16. Under the distributed optimizer a rank has only its shard of the gradient,
so the share of weights that differ by more than 2e-5 behind the update stands in its place.

    python scripts/bench/layouts.py --from FILE...       the compact table of docs/layouts.md from lines printed before
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from r3.trainer.outcome import Rehearsal, worst_difference
from r3.types import Batch, ModelSpec
from tests.gloo_pool import GlooPool
from tests.megatron.layouts import (
    LARGE_LAYOUTS,
    LAYOUTS,
    layout_config,
    run_layout,
)
from tests.megatron.toys import make_batch, write_model

HEAD = (
    "layout",
    "processes",
    "batch",
    "recompute",
    "dtype",
    "ids not replayed",
    "loss difference",
    "gradient difference",
)


def measured(found: Rehearsal, expected: Rehearsal, distributed: bool) -> tuple[str, str, str]:
    """Return the last three cells of a row."""
    missed = found.counts.mismatched_ids + found.counts.required - found.counts.replayed
    if distributed:
        off = [np.abs(found.weights[name] - value).reshape(-1) > 2e-5 for name, value in expected.weights.items()]
        worst = f"weights off: {np.concatenate(off).mean():.1e}"
    else:
        worst = f"{worst_difference(found.gradients, expected.gradients)[0]:.1e}"
    return str(missed), f"{abs(found.loss - expected.loss):.1e}", worst


def rows(names: list[str], world: int, directory: Path, batch: Batch, dtypes: list[str]) -> Iterator[tuple[str, ...]]:
    """Yield the table's rows for layouts of `world` processes."""
    layouts = {**LAYOUTS, **LARGE_LAYOUTS}
    with GlooPool(1) as alone, GlooPool(world) as pool:
        for dtype in dtypes:
            trainer = {"packed": False, "micro_batch_size": 64, "dtype": dtype}
            expected = alone.run(run_layout, layout_config({}, 1, trainer=trainer), directory, batch)[0]
            for name in names:
                for packed in (True, False):
                    for recompute in ("none", "full"):
                        trainer = {"packed": packed, "recompute": recompute, "dtype": dtype}
                        config = layout_config(layouts[name], world, trainer=trainer)
                        found = pool.run(run_layout, config, directory, batch)[0]
                        cells = measured(found, expected, config.trainer.distributed_optimizer)
                        yield name, str(world), "packed" if packed else "padded", recompute, dtype, *cells


def compact(lines: Iterator[str]) -> Iterator[str]:
    """Turn lines that this script printed into one row per layout, of the largest differences."""
    worst: dict[tuple[str, str], dict[str, tuple[int, float, float]]] = {}
    sharded = set()
    for line in lines:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != len(HEAD) or cells[0] == HEAD[0] or set(cells[0]) == {"-"}:
            continue
        name, world, _, _, dtype, missed, loss, last = cells
        if last.startswith("weights off"):
            sharded.add(name)
        found = worst.setdefault((name, world), {}).get(dtype, (0, 0.0, 0.0))
        gradient = float(last.split()[-1])
        worst[name, world][dtype] = (found[0] + int(missed), max(found[1], float(loss)), max(found[2], gradient))
    yield "| layout | processes | ids not replayed | fp32: loss | fp32: gradient | bf16: loss | bf16: gradient |"
    yield "|---" * 7 + "|"
    for (name, world), kinds in worst.items():
        note = "weights off: " if name in sharded else ""
        figures = [f"{kinds[d][1]:.1e} | {note}{kinds[d][2]:.1e}" for d in ("float32", "bfloat16")]
        missed = sum(kind[0] for kind in kinds.values())
        yield f"| {name} | {world} | {missed} | " + " | ".join(figures) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="the layouts of four processes")
    parser.add_argument("--layouts", nargs="+", metavar="NAME", help="some layouts only")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--from", dest="files", nargs="+", type=Path, metavar="FILE", help="make the compact table")
    options = parser.parse_args()
    if options.files:
        print(*compact(line for file in options.files for line in file.open()), sep="\n")
        return
    known = LARGE_LAYOUTS if options.large else LAYOUTS
    names = options.layouts or list(known)
    if set(names) - set(known):
        parser.error(f"unknown layout {sorted(set(names) - set(known))}; known: {', '.join(known)}")
    print("| " + " | ".join(HEAD) + " |")
    print("|" + "---|" * len(HEAD))
    with tempfile.TemporaryDirectory() as place:
        directory = write_model(Path(place) / "model")
        batch = make_batch(ModelSpec.from_directory(directory), groups=4, members=3)
        for row in rows(names, 4 if options.large else 2, directory, batch, options.dtypes):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
