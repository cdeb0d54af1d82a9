#!/usr/bin/env python
"""Measure what reading the answers of a batch takes behind the last of them, with and without an early look at rows.

    python scripts/bench/early_look.py

No engine: a process writes records of Qwen3-30B-A3B's shape into shared memory, evenly over `--seconds`, as a scheduler
does with requests that end one after the other (1,024 in, 64 to 448 out). This one waits for the last, and then reads
all of them as the SGLang adapter does, in turns with and without `EarlyLook`. Medians over the repeats.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from r3.rollout.early import EarlyLook
from r3.rollout.engines.sglang_returned import read_returned
from r3.rollout.provenance import Weights, to_bytes, with_provenance
from r3.rollout.segment import Owner, Ticket, Writer, footprint
from r3.types import ModelSpec

MODEL = ModelSpec("qwen3_moe", 48, tuple(range(48)), 128, 8, 2048, 151_936)
PROMPT = 1024


def lengths(requests: int) -> list[int]:
    """Return the tokens of every sequence."""
    return [PROMPT + int(n) for n in np.random.default_rng(0).integers(64, 449, requests)]


def write(path: str, requests: int, seconds: float, tickets: multiprocessing.Queue[Ticket]) -> None:
    """Write the records one after the other, then tell their places."""
    rng, writer = np.random.default_rng(0), Writer(path)
    longest = np.argsort(rng.random((PROMPT + 448, MODEL.num_layers, MODEL.num_experts), np.float32), -1)
    rows = longest[..., : MODEL.top_k].astype(np.uint8)
    found = []
    begin = time.monotonic()
    for number, size in enumerate(lengths(requests)):
        time.sleep(max(0.0, begin + number * seconds / requests - time.monotonic()))
        data = np.roll(rows[: size - 1], number, axis=0).reshape(-1)
        slot = writer.allocate(data.nbytes, 16 * size)
        assert slot is not None
        slot.data[:] = data
        slot.publish(stamps(size))
        found.append(slot.ticket)
    for ticket in found:
        tickets.put(ticket)


def stamps(size: int) -> bytes:
    """Return the stamps of an answer that nothing disturbed."""
    passes = np.arange(2, size - PROMPT + 2, dtype=np.int32)
    rows = np.concatenate([np.full(PROMPT, 2, np.int32), passes[1:]])
    return to_bytes(rows, passes, [Weights(1, "0", 0)])


def one(requests: int, seconds: float, look: bool) -> float:
    """Return the seconds from the last answer until all are read."""
    sizes = lengths(requests)
    owner = Owner(sum(footprint(size * MODEL.num_layers * MODEL.top_k, 16 * size) for size in sizes) + 4096)
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[Ticket] = context.Queue()
    process = context.Process(target=write, args=(owner.path, requests, seconds, queue))
    process.start()
    tokens = [np.random.default_rng(size).integers(0, 1000, size).astype(np.int32) for size in sizes]
    with EarlyLook(owner, MODEL) if look else nullcontext({}) as sound:
        tickets = [queue.get(timeout=seconds + 120) for _ in sizes]
        begin = time.perf_counter()
    kept = []
    for ticket, ids in zip(tickets, tokens, strict=True):
        decoded, trailer = read_returned(
            owner, (Ticket(*ticket), 0, len(ids) - 1), ids, MODEL,
            request=0, weight_version=0, engine="sglang", start=0, sound=sound,
        )  # fmt: skip
        trace, stale = with_provenance(decoded.routing, trailer, num_tokens=len(ids), prompt_len=PROMPT)
        assert not stale
        kept.append(trace)
    took = time.perf_counter() - begin
    process.join()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--seconds", type=float, default=5, help="in which the answers come")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    found: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(options.repeats):
        for look, times in found.items():
            times.append(1e3 * one(options.requests, options.seconds, look))
    behind, ahead = (statistics.median(times) for times in found.values())
    print(f"{options.requests} answers in {options.seconds:g} s, read behind the last: {behind:.1f} ms")
    print(f"the same with an early look: {ahead:.1f} ms, {ahead / behind:.2f} of it")


if __name__ == "__main__":
    main()
