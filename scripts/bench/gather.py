#!/usr/bin/env python
"""Measure how long two trainer ranks take to gather their shards on rank 0 and to pack them into buckets.

    python scripts/bench/gather.py                 # two GPUs and NCCL where there are two, else the CPU and gloo
    python scripts/bench/gather.py --print

Rank 0 holds nothing, rank 1 experts of a mixture-of-experts layer in bfloat16, so that everything travels: `large`
matrices are Qwen3-30B-A3B's (6.3 and 3.1 MB), `small` ones 24 and 12 KB. *Batches* is the product's walk
(`r3.trainer.gather`), *one by one* what it replaced: each tensor through host memory, behind a message that describes
it. Both fill the product's buckets on rank 0 and take turns; the first pair makes connections and is not counted.

Rows of docs/benchmarks/gather.json are `name, value, unit, baseline, ratio, ci95`: seconds of a whole walk with
Student's 95 % interval, and by what factor the batches are faster.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from sync import ROOT, Row, environment, interval

from r3.trainer.gather import Shard, ShardGather
from r3.trainer.stream import BucketStream

TARGET = ROOT / "docs" / "benchmarks" / "gather.json"
LIMIT_S = 300.0
# Experts, hidden size, inner size.
SHAPES = {"large": (48, 2048, 768), "small": (6144, 128, 48)}

Tensors = Iterator[tuple[str, torch.Tensor]]
Way = Callable[[], Tensors]


def make_experts(shape: str, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the matrices that rank 1 holds."""
    experts, hidden, inner = SHAPES[shape]
    sizes = {"fc1": (2 * inner, hidden), "fc2": (hidden, inner)}
    return {
        f"{expert}.{name}": torch.randn(size, device=device).to(torch.bfloat16)
        for expert in range(experts)
        for name, size in sizes.items()
    }


def batches(tensors: Mapping[str, torch.Tensor], rank: int, device: torch.device, limit: int) -> Way:
    """Return the product's walk."""
    mine = [Shard(name, 0, 1, tuple(one.shape), one.dtype) for name, one in tensors.items()] if rank else []
    gather = ShardGather(mine, limit, device)
    return lambda: ((name, parts[0]) for name, parts in gather.walk(lambda name, _: tensors[name]))


def one_by_one(tensors: Mapping[str, torch.Tensor], rank: int) -> Way:
    """Return the walk of before: a description, then the bytes, through host memory."""

    def send() -> Tensors:
        for name in tensors:
            one = tensors[name].cpu()
            dist.send_object_list([(tuple(one.shape), one.dtype)], 0, device=torch.device("cpu"))
            dist.send(one.reshape(-1).view(torch.uint8), 0)
        yield from ()

    def receive() -> Tensors:
        for name in tensors:
            facts: list[Any] = [None]
            dist.recv_object_list(facts, 1, device=torch.device("cpu"))
            one = torch.empty(facts[0][0], dtype=facts[0][1])
            dist.recv(one.reshape(-1).view(torch.uint8), 1)
            yield name, one

    return send if rank else receive


def timed(way: Way, rank: int, device: torch.device, limit: int) -> float:
    """Take one walk, into buckets on rank 0, and return its seconds."""
    dist.barrier()
    begin = time.perf_counter()
    if rank:
        for _ in way():
            pass
    else:
        stream = BucketStream(way(), torch.bfloat16, limit, device, verify=False)
        number = -1
        while not stream.fill(number).last:
            number += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def serve(rank: int, port: int, options: argparse.Namespace) -> None:
    """Be one rank; rank 0 reports."""
    torch.set_num_threads(1)
    gpus = torch.cuda.device_count() >= 2
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=LIMIT_S))
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=timedelta(seconds=LIMIT_S))
    rows: list[Row] = []
    for shape in SHAPES:
        tensors = make_experts(shape, device)
        limit = options.bucket_mib << 20
        ways = {"one by one": one_by_one(tensors, rank), "batches": batches(tensors, rank, device, limit)}
        found: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(1 + options.repeats):
            for name, way in ways.items():
                seconds = timed(way, rank, device, limit)
                if turn:
                    found[name].append(seconds)
        rows += rows_of(shape, sum(one.nbytes for one in tensors.values()), len(tensors), found)
    dist.destroy_process_group()
    if rank == 0:
        report(rows, options)


def rows_of(shape: str, nbytes: int, count: int, found: Mapping[str, list[float]]) -> list[Row]:
    """Return the rows of one shape."""
    name = f"{shape}, {count} tensors, {nbytes / 1e6:.0f} MB"
    means = {way: sum(seconds) / len(seconds) for way, seconds in found.items()}
    base = f"{name}, one by one"
    return [
        Row(f"{name}, {way}", mean, "s", base, means["one by one"] / mean, interval(found[way]))
        for way, mean in means.items()
    ]


def report(rows: list[Row], options: argparse.Namespace) -> None:
    """Print the rows, and write the file."""
    run = {"environment": environment(), "rows": [asdict(row) for row in rows]}
    print(json.dumps(run, indent=1))
    if not options.print:
        options.target.write_text(json.dumps({"runs": [run]}, indent=1) + "\n")


def main() -> None:
    """Start both ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="walks of each kind")
    parser.add_argument("--bucket-mib", type=int, default=64)
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--print", action="store_true", help="print the rows, write no file")
    options = parser.parse_args()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(serve, (store.port, options), nprocs=2)


if __name__ == "__main__":
    main()
