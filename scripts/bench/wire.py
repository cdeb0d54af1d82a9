#!/usr/bin/env python
"""Measure what a routing record costs on its way in: decode, wire form, Ray; write docs/benchmarks.md.

    python scripts/bench/wire.py
    python scripts/bench/wire.py --no-ray --print

One sample of 32,768 tokens x 48 layers x top-8 of 128 experts by default, and everything in one run, so that the
ratios mean something on a busy machine. Wall time, best of the repeats. Rows of docs/benchmarks/wire.json are `name,
value, unit, baseline, ratio`; ratio is value / value of the baseline. *Plain* is what a client writes that takes shape
and content on trust.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pybase64

from r3 import record
from r3.rollout.wire import decode_sglang
from r3.routing import RoutingTrace, narrow
from r3.types import ModelSpec

DOCS = Path(__file__).resolve().parents[2] / "docs"
TARGET, PAGE = DOCS / "benchmarks" / "wire.json", DOCS / "benchmarks.md"
BEGIN, END = "<!-- wire table: scripts/bench/wire.py -->", "<!-- end of wire table -->"
LAYERS, K, EXPERTS = 48, 8, 128
MODEL = ModelSpec("qwen3_moe", LAYERS, tuple(range(LAYERS)), EXPERTS, K, 2048, 151_936)


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; `ratio` to the row named `baseline`."""

    name: str
    value: float
    unit: str
    baseline: str
    ratio: float


class Table:
    """Measurements in the order in which they were made."""

    def __init__(self, repeats: int) -> None:
        self._repeats = repeats
        self.rows: list[Row] = []

    def race(self, baseline: str, calls: Mapping[str, Callable[[], object]]) -> None:
        """Measure calls in milliseconds, in turns, so that what else the machine does falls on all of them."""
        best = dict.fromkeys(calls, float("inf"))
        for _ in range(self._repeats):
            for name, call in calls.items():
                begin = time.perf_counter()
                kept = call()
                best[name] = min(best[name], time.perf_counter() - begin)
                del kept
        for name, seconds in best.items():
            self.add(name, 1e3 * seconds, "ms", baseline)

    def add(self, name: str, value: float, unit: str, baseline: str) -> None:
        """Record a value."""
        against = next((row.value for row in self.rows if row.name == baseline), value)
        self.rows.append(Row(name, round(value, 4), unit, baseline, round(value / against, 4)))
        print(f"{name:<44} {value:>12.3f} {unit:<3}  {value / against:>8.3f} x {baseline}", flush=True)


def make(tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return int32 rows as SGLang sends them `[tokens - 1, layers, k]`, and token ids."""
    generator = np.random.default_rng(0)
    some = generator.random((1024, LAYERS, EXPERTS), np.float32).argsort(axis=2)[:, :, :K].astype(np.int32)
    order = np.concatenate([generator.permutation(1024) for _ in range(-(-tokens // 1024))])
    return some[order[: tokens - 1]], generator.integers(0, 150_000, tokens).astype(np.int32)


def plain(payload: str) -> np.ndarray:
    """Decode with the standard library to a flat int32 array, viewed by a shape that is taken on trust."""
    return np.frombuffer(base64.b64decode(payload), np.int32).reshape(-1, LAYERS, K)


def strict(payload: str) -> bytes:
    """Decode base64 and refuse what is none."""
    return binascii.a2b_base64(payload, strict_mode=True)


def decode(table: Table, wide: np.ndarray, tokens: np.ndarray) -> RoutingTrace:
    """Compare the checked decode with the plain one."""
    payload = base64.b64encode(wide.tobytes()).decode()

    def ours() -> RoutingTrace:
        return decode_sglang(payload, tokens, MODEL, request=0, weight_version=0, engine="benchmark").routing

    calls = {
        "base64 int32, plain": lambda: plain(payload),
        "base64 int32, plain, to uint8 unchecked": lambda: plain(payload).astype(np.uint8),
        "base64 int32, decode_sglang (checked uint8)": ours,
        "base64 alone, standard library, strict": lambda: strict(payload),
        "base64 alone, pybase64, strict": lambda: pybase64.b64decode(payload, None, True),
        "narrowing alone, checked": lambda: narrow(wide, EXPERTS),
    }
    table.race("base64 int32, plain", calls)
    return ours()


def wire_form(table: Table, trace: RoutingTrace, tokens: np.ndarray) -> None:
    """Compare writing and reading the wire form with pickling, which checks nothing."""
    pickled, written = pickle.dumps(trace, protocol=5), trace.to_bytes(tokens)
    writing = {
        "pickle.dumps": lambda: pickle.dumps(trace, protocol=5),
        "to_bytes (checked)": lambda: trace.to_bytes(tokens),
    }
    reading = {
        "pickle.loads": lambda: pickle.loads(pickled),
        "from_bytes (checked, no copy)": lambda: record.decode(written),
    }
    table.race("pickle.dumps", writing)
    table.race("pickle.loads", reading)
    table.add("base64 int32, bytes", 4 * -(-trace.experts.size * 4 // 3), "B", "base64 int32, bytes")
    table.add("wire form, bytes", len(written), "B", "base64 int32, bytes")


def through_ray(table: Table, trace: RoutingTrace, wide: np.ndarray) -> None:
    """Compare put and get of our record with those of the same routing as int32, in torch and in numpy."""
    # A busy machine may take longer to start a node than Ray waits by default.
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
    import ray
    import torch

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    values: dict[str, Any] = {"int32 torch": torch.from_numpy(wide), "int32 numpy": wide, "uint8 record": trace}
    references = {name: ray.put(value) for name, value in values.items()}
    putting = {f"ray.put, {name}": lambda value=value: ray.put(value) for name, value in values.items()}
    getting = {f"ray.get, {name}": lambda ref=ref: ray.get(ref) for name, ref in references.items()}
    table.race("ray.put, int32 torch", putting)
    table.race("ray.get, int32 torch", getting)
    table.add("object store, int32", wide.nbytes, "B", "object store, int32")
    table.add("object store, uint8 record", trace.experts.nbytes, "B", "object store, int32")
    ray.shutdown()


def page_table(rows: Sequence[Row]) -> str:
    """Return the measurements as a Markdown table."""
    head = "| what | value | ratio | to |\n|---|---|---|---|\n"
    return head + "\n".join(
        f"| {row.name} | {row.value / 2**20:.1f} MiB | {row.ratio:.2f} | {row.baseline} |" if row.unit == "B"
        else f"| {row.name} | {row.value:.4g} ms | {row.ratio:.3g} | {row.baseline} |"
        for row in rows
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--print", action="store_true", help="leave the docs alone")
    options = parser.parse_args()
    wide, tokens = make(options.tokens)
    table = Table(options.repeats)
    trace = decode(table, wide, tokens)
    wire_form(table, trace, tokens)
    if not options.no_ray:
        through_ray(table, trace, wide)
    if not options.print:
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text("[\n" + ",\n".join(" " + json.dumps(asdict(row)) for row in table.rows) + "\n]\n")
        text = PAGE.read_text()
        PAGE.write_text(
            f"{text[: text.index(BEGIN) + len(BEGIN)]}\n\n{page_table(table.rows)}\n\n{text[text.index(END) :]}"
        )


if __name__ == "__main__":
    main()
