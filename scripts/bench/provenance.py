#!/usr/bin/env python
"""What stamping costs: generation with and without the plugin in interleaved pairs; prints the table of the docs.

    python scripts/bench/provenance.py --pairs 30

Two real SGLang engines on a CPU with the same weights, one with the plugin and one without (SGLANG_PLUGINS leaves it
out), answer the same requests in turn, in alternating order. Ratios, of the time of a call and of the CPU time of the
engine's scheduler in it, are medians over pairs, with the 95 % interval of a bootstrap. Bytes: of the scheduler's book
per KV slot, and of the stamps per row in an answer.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import psutil

from r3.rollout.engine import Request, Sampling
from r3.rollout.engines.sglang import SglangEngine
from r3.rollout.provenance import KEY
from tests import plugin_entry
from tests.real_engine import engine_config
from tests.tiny_model import VOCAB_SIZE, write_model


def schedulers() -> list[psutil.Process]:
    """Return the scheduler processes of this one."""
    return [child for child in psutil.Process().children(recursive=True) if "sglang::sch" in " ".join(child.cmdline())]


def start(model: Path, stamping: bool) -> tuple[SglangEngine, psutil.Process]:
    """Start one engine with or without the plugin; return it and its scheduler's process."""
    others = {child.pid for child in schedulers()}
    plugin_entry.show() if stamping else plugin_entry.hide()
    routing = {"provenance": "require" if stamping else "auto"}
    engine = SglangEngine(engine_config(routing=routing, max_total_tokens=32_768), model, 0)
    assert (engine.spec().provenance == "exact") == stamping
    (process,) = [child for child in schedulers() if child.pid not in others]
    return engine, process


def timed(engine: SglangEngine, process: psutil.Process, requests: list[Request], tokens: int) -> tuple[float, float]:
    """Return the seconds of one call from an empty cache, and the scheduler's CPU seconds in it."""
    engine.flush_cache()
    before, begin = process.cpu_times(), time.perf_counter()
    engine.generate(requests, Sampling(1.0, tokens, ignore_eos=True), capture=True)
    seconds, after = time.perf_counter() - begin, process.cpu_times()
    return seconds, after.user + after.system - before.user - before.system


def summary(ratios: np.ndarray[Any, Any]) -> str:
    """Return the median and its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).choice(ratios, size=(4000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return f"{np.median(ratios):.3f} ({low:.3f} to {high:.3f})"


def wire_bytes(engine: SglangEngine, requests: list[Request], tokens: int) -> float:
    """Return the bytes of stamps per row, as JSON, in raw answers."""
    outputs = engine._engine.generate(
        input_ids=[request.tokens.tolist() for request in requests],
        sampling_params={"max_new_tokens": tokens, "ignore_eos": True},
        return_routed_experts=True,
    )
    size = sum(len(json.dumps(output["meta_info"][KEY][-1])) for output in outputs)
    return size / sum(len(request.tokens) + tokens - 1 for request in requests)


def main() -> None:
    """Print one row per batch size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=30)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder), seed=0)
        engines = {stamping: start(model, stamping) for stamping in (True, False)}
        print("| requests x tokens | pairs | time with / without | CPU time with / without | per KV slot | per row |")
        print("|---|---|---|---|---|---|")
        for batch, tokens in ((1, 128), (64, 32)):
            requests = [Request(generator.integers(2, VOCAB_SIZE, 32).astype(np.int32)) for _ in range(batch)]
            found = []
            for pair in range(-1, options.pairs):
                order = (True, False) if pair % 2 else (False, True)
                seconds = {stamping: timed(*engines[stamping], requests, tokens) for stamping in order}
                if pair >= 0:  # the first pair warms up
                    found.append(np.divide(seconds[True], seconds[False]))
            wall, cpu = np.stack(found, axis=1)
            size = wire_bytes(engines[True][0], requests, tokens)
            print(
                f"| {batch} x {tokens} | {options.pairs} | {summary(wall)} | {summary(cpu)} | 4 bytes "
                f"| {size:.2f} bytes |", flush=True,
            )  # fmt: skip
        for engine, _ in engines.values():
            engine.close()


if __name__ == "__main__":
    main()
