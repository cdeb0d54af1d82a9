#!/usr/bin/env python
"""Measure which stage finds which corruption of a routing record, and write the table of docs/checks.md.

    python scripts/docs/corruption.py
    python scripts/docs/corruption.py --trials 200 --print

Records come from a synthetic router (`tests/synthetic_router.py`); the corruptions and the three stages are those of
`tests/corruption.py`. Every trial draws a model, two of its sequences and a corruption of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from tests.corruption import CHANGES, changed, found_by_meaning, found_by_structure, found_on_wire, refused
from tests.synthetic_router import Router, Sample, Shape

PAGE = Path(__file__).resolve().parents[2] / "docs" / "checks.md"
BEGIN, END = "<!-- corruption table: scripts/docs/corruption.py -->", "<!-- end of corruption table -->"
SHAPES = (Shape(4, 4, 16), Shape(8, 8, 64), Shape(8, 8, 256), Shape(8, 8, 384))
HEAD = "| corruption | wire | structural | semantic |\n|---|---|---|---|"


def make_pools(sequences: int, seed: int) -> list[list[Sample]]:
    """Return `sequences` samples of 70 to 800 tokens for each model."""
    draw = np.random.default_rng(seed)
    pools = []
    for i, shape in enumerate(SHAPES):
        router = Router(shape, seed=seed + i)
        pools.append([router.sample(int(draw.integers(70, 801))) for _ in range(sequences)])
    return pools


def rows(pools: list[list[Sample]], trials: int, seed: int) -> Iterator[str]:
    """Yield the rows of the table."""
    for name in CHANGES:
        draw = np.random.default_rng([seed, *name.encode()])
        found, done = np.zeros(3, int), 0
        while done < trials:
            pool = pools[int(draw.integers(0, len(pools)))]
            i, j = draw.choice(len(pool), 2, replace=False)
            sample, wrong = pool[i], changed(name, pool[i], pool[j], draw)
            original = sample.trace.experts
            if name != "none" and wrong.shape == original.shape and (wrong == original).all():
                continue
            done += 1
            found += [found_on_wire(sample, wrong), found_by_structure(sample, wrong), found_by_meaning(sample, wrong)]
        yield f"| {name} | " + " | ".join(share(count, trials) for count in found) + " |"
    yield from damaged(pools, trials, seed)


def damaged(pools: list[list[Sample]], trials: int, seed: int) -> Iterator[str]:
    """Yield the rows of corruptions that only bytes can have: nothing but the reader sees them."""
    draw = np.random.default_rng([seed, 1])
    flips = cuts = 0
    for _ in range(trials):
        pool = pools[int(draw.integers(0, len(pools)))]
        sample = pool[int(draw.integers(0, len(pool)))]
        data = sample.trace.to_bytes(sample.tokens)
        flipped = bytearray(data)
        flipped[int(draw.integers(0, len(data) - sample.trace.experts.nbytes))] ^= 1 << int(draw.integers(0, 8))
        flips += refused(bytes(flipped))
        cuts += refused(data[: int(draw.integers(0, len(data)))])
    yield f"| bit flip in header, tables or tokens | {share(flips, trials)} | | |"
    yield f"| file cut off | {share(cuts, trials)} | | |"


def share(count: int, trials: int) -> str:
    """Return a rate that says 100 % and 0 % only where it is exactly that."""
    if count in (0, trials):
        return "100 %" if count else "0"
    return f"{min(max(100 * count / trials, 0.1), 99.9):.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000, help="of each corruption")
    parser.add_argument("--sequences", type=int, default=12, help="samples of each model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--print", action="store_true", help="print the table, leave the page alone")
    options = parser.parse_args()
    made = rows(make_pools(options.sequences, options.seed), options.trials, options.seed)
    table = "\n".join([HEAD, *made])
    if options.print:
        print(table)
        return
    text = PAGE.read_text()
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    note = f"\n\n{options.trials:,} trials of each, seed {options.seed}.\n\n"
    PAGE.write_text(text[:begin] + note + table + "\n\n" + text[end:])


if __name__ == "__main__":
    main()
