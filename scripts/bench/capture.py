#!/usr/bin/env python
"""What capturing and returning routing costs a real engine; writes docs/benchmarks/capture.json.

    python scripts/bench/capture.py --load one=130 --load batch=300 --load mixed=600      # one GPU
    python scripts/bench/capture.py --tp 2 --append --load batch=300                      # two GPUs, one more run
    python scripts/bench/capture.py --load one=130 --dry-run                              # what would be run, no engine
    python scripts/bench/capture.py --cpu --load one=10 --load mixed=20 --print           # a tiny model, CPU engine

Qwen3-30B-A3B's shape with dummy weights, one engine start. The engine's ways of handling routing are switched between
runs (`scripts/bench/capture_plugin.py`), so that all of them meet the same engine, weights, KV pool and clocks: `off`
(no capture), `on` (captured, not asked for), `stock` (SGLang's own return: int32, base64) and `ours` (shared memory,
with provenance stamps). A round runs each way once, on the same prompts, in an order by which, over four rounds, every
way follows every other; two runs of one round are a pair. A ratio is the geometric mean over pairs with Student's 95 %
interval of its logarithm; a share of a run's own generation time is an arithmetic mean. The radix cache is flushed
before every run, log-probs are not asked for. The first passes of each way are a warm-up and thrown away, and so is one
whole run of a load of more than one request: it touches memory first and brings the clocks to where they stay.

No pass is formed before all requests of a run wait in the scheduler, and the clock starts then: which passes there are
follows from the load alone, and a pair whose ways made different ones is marked.

Loads, run in the order given, `NAME=SECONDS` each; a round is begun only if the longest one so far would still fit:
`one` (1,024 in, 1,024 out, alone), `batch` (64 at once, 1,024 in, 512 out), `mixed` (512 of 1,024 in, 64 to 448 out, at
most 256 running), `cached` (256 at once, prompts in the cache, 64 to 448 out) and `tee`: bit equality of SGLang's own
path and ours, fed from the same passes, with groups of equal prompts, half of them cached before, and with requests
retracted and aborted on the way. The file is written again after every run, so a run that is killed keeps what it had.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from scripts.bench.capture_table import (
    WAYS,
    Load,
    Round,
    Row,
    Run,
    earlier_runs,
    line_of,
    order_of,
    pinned_rows,
    raw_of,
    row,
    rows_of,
    save,
)  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "docs" / "benchmarks" / "capture.json"
NAMES = ("one", "batch", "mixed", "cached", "tee")
DEFAULT = ("one=130", "batch=300", "mixed=600", "tee=120")


def main() -> None:
    options = parse()
    loads = loads_of(options)
    for name, seconds in options.load:
        print(plan_of(name, seconds, loads[name], options), flush=True)
    if options.dry_run:
        return
    from scripts.bench.capture_engine import Bench

    bench = Bench(options)
    print(f"engine up in {bench.start_s:.0f} s", flush=True)
    table: dict[str, Any] = {"environment": environment(options, bench), "raw": {}, "rows": []}
    earlier = earlier_runs(options.target) if options.append else []

    def keep() -> None:
        if not options.print:
            save(options.target, earlier, table)

    try:
        measure(bench, loads, options, table, keep)
        table["rows"] += sizes(bench)
        keep()
    finally:
        bench.engine.shutdown()
    if options.print:
        print(json.dumps(table["rows"], indent=1))


def measure(
    bench: Any, loads: dict[str, Load], options: argparse.Namespace, table: dict[str, Any], keep: Callable[[], None]
) -> None:
    """Run every load for its time; what one leaves over goes to the next."""
    spare = 0.0
    for name, seconds in options.load:
        begin, before, load = time.perf_counter(), list(table["rows"]), loads[name]
        until = begin + seconds + spare
        if name == "tee":
            table["rows"] = before + equality(bench, load, options, until)
            keep()
        else:
            before += warm_up(bench, load)

            def note(rounds: Sequence[Round], before: list[Row] = before, load: Load = load) -> None:
                table["raw"][load.name] = raw_of(rounds)
                table["rows"] = before + rows_of(load, rounds)
                keep()

            race(bench, load, until, options.pairs, note)
        spare = max(0.0, until - time.perf_counter())


def warm_up(bench: Any, load: Load) -> list[Row]:
    """Make the first passes of a load in every way, and one whole run of a crowd; return the pinned memory of each way.

    Memory that a pass has pinned is kept for the next, so each way begins without.
    """
    short = load.short()
    runs = [bench.run(short, way, bench.requests(short), trim=True) for way in order_of(0, bench.ways)]
    if load.is_crowd:
        run = bench.run(load, "ours", bench.requests(load))
        print(f"{load.name}, not counted: ours {load.tokens / run.seconds:.0f} tokens/s", flush=True)
    return pinned_rows(load, runs)


def race(
    bench: Any, load: Load, until: float, pairs: int, note: Callable[[Sequence[Round]], None]
) -> list[dict[str, Run]]:
    """Run a load in every way, round by round, until the pairs are there or the time is over; one round at least.

    `note` is told of all rounds after every run, the last of which may be incomplete.
    """
    found: list[dict[str, Run]] = []
    longest = 0.0
    while len(found) < pairs and (not found or time.perf_counter() + longest < until):
        started, requests, runs = time.perf_counter(), bench.requests(load), {}
        found.append(runs)
        for way in order_of(len(found) - 1, bench.ways):
            runs[way] = bench.run(load, way, requests)
            note(found)
        longest = max(longest, time.perf_counter() - started)
        print(line_of(load, len(found), runs, longest), flush=True)
    return found


def equality(bench: Any, load: Load, options: argparse.Namespace, until: float) -> list[Row]:
    """Compare both paths until the time is over, twice at least, and return the table's rows."""
    from scripts.bench.capture_tee import tee

    found: list[tuple[str, dict[str, int]]] = []
    longest = 0.0
    while len(found) < 2 or time.perf_counter() + longest < until:
        started = time.perf_counter()
        way = "tee_raw" if len(found) == 1 else "tee"
        bench.switch(way)
        bench.flush()
        found.append((way, tee(bench, bench.requests(load), options.group, options.tee_pause)))
        bench.owner.abandon()
        print(*found[-1], flush=True)
        longest = max(longest, time.perf_counter() - started)
    rows = []
    for way, what in (("tee", "SGLang's path fed copies"), ("tee_raw", "SGLang's path fed its buffer, as 0.5.17 does")):
        for key in found[0][1]:
            value = sum(counts[key] for name, counts in found if name == way)
            rows.append(row(f"bit equality, {what}: {key}", value, "count"))
    return rows


def sizes(bench: Any) -> list[Row]:
    """Return what the rows of KV slots take in host memory, and how many layers' ids travel together, per rank."""
    rows = []
    for rank, found in enumerate(bench.facts()):
        pinned = found["stock_bytes"] if found["stock_pinned"] else 0
        rows += [
            row(f"pinned slot rows, stock, rank {rank}", pinned, "bytes"),
            row(f"pinned slot rows, ours, rank {rank}", 0, "bytes", "stock", 0.0 if pinned else 1.0),
            row(f"slot rows in ordinary memory, ours, rank {rank}", found["ours_bytes"], "bytes"),
            row(f"layers whose ids are copied once a pass, ours, rank {rank}", found["copied_at_once"], "layers"),
        ]
        for name in ("stock", "ours"):
            size = found[f"{name}_bytes"] / found["slots"] * 1e6 / 2**30
            rows.append(row(f"slot rows, {name}, per million KV slots, rank {rank}", size, "GiB"))
    return rows


def environment(options: argparse.Namespace, bench: Any) -> dict[str, Any]:
    """Return host, versions and commit."""
    import sglang
    import torch

    commit = os.environ.get("R3_COMMIT") or subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()  # fmt: skip
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {
        "host": f"{options.tp} x {gpu}, {os.cpu_count()} cores, {platform.machine()}", "commit": commit,
        "sglang": sglang.__version__, "torch": torch.__version__, "python": platform.python_version(),
        "model": asdict(bench.model), "engine": "dummy weights" if not options.cpu else "CPU",
        "engine_start_s": round(bench.start_s, 1), "max_running_requests": options.running, "tp": options.tp,
        "return_logprob": False, "clock": "from the arrival of the last request",
    }  # fmt: skip


def loads_of(options: argparse.Namespace) -> dict[str, Load]:
    """Return the loads by name; those of `--cpu` are tiny."""
    if options.cpu:
        few = tuple(4 + i % 8 for i in range(16))
        made = {
            "one": Load("1 request", (64,), (16,)),
            "batch": Load("4 requests", (32,) * 4, (8,) * 4),
            "mixed": Load("16 requests", (32,) * 16, few),
            "cached": Load("8 requests, cached", (32,) * 8, few[:8], cached=True),
        }
        return made | {"tee": made["mixed"]}
    lengths = tuple(int(n) for n in np.random.default_rng(1).integers(64, 449, max(options.mixed, options.running)))
    queue, crowd = lengths[: options.mixed], lengths[: options.running]
    made = {
        "one": Load(f"1 request, 1024 in, {options.out_one} out", (1024,), (options.out_one,), speed=205),
        "batch": Load(f"64 requests, 1024 in, {options.out_batch} out", (1024,) * 64, (options.out_batch,) * 64,
                      speed=2600),
        "mixed": Load(f"{len(queue)} requests, 1024 in, 64 to 448 out, at most {options.running} running",
                      (1024,) * len(queue), queue, speed=4100),
        "cached": Load(f"{len(crowd)} requests at once, 1024 in (cached), 64 to 448 out", (1024,) * len(crowd), crowd,
                       cached=True, speed=4500),
    }  # fmt: skip
    return made | {"tee": made["mixed"]}


def plan_of(name: str, seconds: float, load: Load, options: argparse.Namespace) -> str:
    """Return what a load will do in its time, by speeds that one H200 was seen to have."""
    if name == "tee":
        return f"tee: bit equality for {seconds:g} s, two comparisons of {len(load.prompts)} answers at least"
    a_run = load.tokens / load.speed
    a_round, counted = len(WAYS) * a_run, max(0.0, seconds - a_run * load.is_crowd)
    orders = "; ".join(" ".join(order_of(number)) for number in range(4))
    expected = "" if options.cpu else f", a round takes about {a_round:.0f} s, so {counted / a_round:.1f} pairs fit"
    return f"{name}: {load.name}, {load.tokens} tokens a run{expected}, at most {options.pairs}; orders: {orders}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", action="append", metavar="NAME=SECONDS", help=f"{', '.join(NAMES)}; repeat it")
    for name, value, what in (
        ("pairs", 9, "most pairs of a load"), ("tp", 1, "tensor parallel ranks"),
        ("running", 256, "requests at once"), ("mixed", 512, "requests of `mixed`"), ("out-one", 1024, "tokens"),
        ("out-batch", 512, "tokens"), ("layers", 48, "of the model"), ("shared-mib", 1024, "of the segment"),
        ("group", 4, "requests of `tee` with equal prompts"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{what} (default {value})")
    parser.add_argument("--mem-fraction", type=float, default=0.85)
    parser.add_argument("--log-level", default="error")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and start nothing")
    parser.add_argument("--cpu", action="store_true", help="a tiny model on the CPU engine")
    parser.add_argument("--append", action="store_true", help="keep the runs that the file holds")
    parser.add_argument("--print", action="store_true", help="leave the docs alone")
    parser.add_argument("--target", type=Path, default=TARGET)
    options = parser.parse_args(arguments)
    options.tee_pause = 0.2 if options.cpu else 2.0
    options.load = [_budget(parser, text) for text in options.load or DEFAULT]
    return options


def _budget(parser: argparse.ArgumentParser, text: str) -> tuple[str, float]:
    name, _, seconds = text.partition("=")
    if name not in NAMES or not seconds.replace(".", "", 1).isdigit():
        parser.error(f"--load {text}: NAME=SECONDS with a name of {', '.join(NAMES)}")
    return name, float(seconds)


if __name__ == "__main__":
    main()
