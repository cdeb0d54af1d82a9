#!/usr/bin/env python
"""Measure the structural checks of a routing record, and print the table of docs/checks.md.

    python scripts/bench/checks.py
    python scripts/bench/checks.py --tokens 8192 --repeats 21

Each check runs alone over one record, on one core; *all* is what a record goes through when it is read, `validate` and
`check_live`, to which the limit of 2 ms per million ids applies. CPU time, the best of the repeats, so that other work
on the machine weighs little; the ratio is to the plain form of the same check in the same run.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from r3.routing import RoutingTrace, check_spans, checksum, validate_rows
from r3.structure import check_live, constant_layers, has_repeats, longest_run, repeated_ids

LIMIT_MS = 2.0
# Layers, top-k and experts of Qwen3-30B-A3B, DeepSeek-V3 (58 MoE layers), Kimi-K2 (60), Mixtral 8x7B.
MODELS = ((48, 8, 128), (58, 8, 256), (60, 8, 384), (32, 2, 8))


def make_record(tokens: int, layers: int, k: int, experts: int) -> tuple[RoutingTrace, np.ndarray]:
    """Return a full record of random rows without repeats; rows come back every 1024, in another order."""
    generator = np.random.default_rng(0)
    some = generator.random((1024, layers, experts), np.float32).argsort(axis=2)[:, :, :k]
    rows = some[np.concatenate([generator.permutation(1024) for _ in range(-(-tokens // 1024))])[: tokens - 1]]
    ids = generator.integers(0, 150_000, tokens).astype(np.int32)
    made = RoutingTrace.record(
        rows, ids, layers=range(layers), num_experts=experts, weight_version=0, engine="benchmark"
    )
    return made, ids


def plain_constant(rows: np.ndarray) -> bool:
    return bool((rows == rows[:1]).all(axis=(0, 2)).any())


def plain_runs(rows: np.ndarray) -> bool:
    return bool((rows[1:] == rows[:-1]).all(axis=(1, 2)).any())


def plain_repeats(rows: np.ndarray) -> bool:
    ordered = np.sort(rows, axis=2)
    return bool((ordered[:, :, 1:] == ordered[:, :, :-1]).any())


def whole(trace: RoutingTrace, tokens: np.ndarray) -> None:
    validate_rows(trace.experts, trace.layers, trace.num_experts)
    check_spans(trace.spans, trace.rows, len(tokens))
    check_live(trace.experts, trace.layers, trace.num_experts, tokens[trace.positions()])


def best_ms(call: Callable[[], object], repeats: int) -> float:
    """Return the CPU milliseconds of the fastest of `repeats` calls."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return 1e3 * min(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    print("| layers x k of experts | check | ms per million ids | plain form | plain / ours |\n|---|---|---|---|---|")
    over = False
    for layers, k, experts in MODELS:
        trace, tokens = make_record(options.tokens, layers, k, experts)
        rows, inputs, millions = trace.experts, tokens[:-1], trace.experts.size / 1e6
        checks: list[tuple[str, Callable[[], object], Callable[[], object] | None]] = [
            ("range", lambda r=rows: r.max(), None),
            ("no expert twice", lambda r=rows: has_repeats(r), lambda r=rows: plain_repeats(r)),
            ("no expert twice, strided compares", lambda r=rows: repeated_ids(r).any(), None),
            ("constant layers", lambda r=rows: constant_layers([r]), lambda r=rows: plain_constant(r)),
            ("identical rows", lambda r=rows, i=inputs: longest_run(r, i), lambda r=rows: plain_runs(r)),
            ("checksum, not in all", lambda t=trace, i=tokens: checksum(t.experts, i), None),
            ("**all**", lambda t=trace, i=tokens: whole(t, i), None),
        ]
        for name, ours, plain in checks:
            mine = best_ms(ours, options.repeats) / millions
            theirs = best_ms(plain, 2) / millions if plain else None
            cells = f"{theirs:.3f} | {theirs / mine:.0f} x" if theirs is not None else "| "
            print(f"| {layers} x {k} of {experts} | {name} | {mine:.3f} | {cells} |", flush=True)
        over |= mine > LIMIT_MS
    print(f"\n**all** is {'over' if over else 'within'} the limit of {LIMIT_MS:g} ms per million ids", file=sys.stderr)
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
