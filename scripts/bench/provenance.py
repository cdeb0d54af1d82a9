#!/usr/bin/env python
"""What stamping costs: generation with and without the plugin in interleaved pairs; prints the table of the docs.

    python scripts/bench/provenance.py --pairs 30

Two real SGLang engines on a CPU with the same weights, one with the plugin and one without (SGLANG_PLUGINS leaves it
out), answer the same requests in turn, in alternating order. The ratio is the median over pairs, with the 95 % interval
of a bootstrap. Bytes: of the scheduler's book per KV slot, and of the stamps per row in an answer.
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

from r3.rollout.engine import Request, Sampling
from r3.rollout.engines.sglang import SglangEngine
from r3.rollout.provenance import KEY
from tests import plugin_entry
from tests.real_engine import engine_config
from tests.tiny_model import VOCAB_SIZE, write_model


def start(model: Path, stamping: bool) -> SglangEngine:
    """Start one engine with or without the plugin."""
    plugin_entry.show() if stamping else plugin_entry.hide()
    routing = {"provenance": "require" if stamping else "auto"}
    engine = SglangEngine(engine_config(routing=routing, max_total_tokens=32_768), model, 0)
    assert (engine.spec().provenance == "exact") == stamping
    return engine


def timed(engine: SglangEngine, requests: list[Request], tokens: int) -> float:
    """Return the seconds of one call from an empty cache."""
    engine.flush_cache()
    begin = time.perf_counter()
    engine.generate(requests, Sampling(1.0, tokens, ignore_eos=True), capture=True)
    return time.perf_counter() - begin


def interval(ratios: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median."""
    drawn = np.random.default_rng(0).choice(ratios, size=(4000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


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
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder), seed=0)
        engines = {stamping: start(model, stamping) for stamping in (True, False)}
        print(
            "| requests x tokens | pairs | time with / without, median (95 %) | bytes per KV slot | per row, answer |"
        )
        print("|---|---|---|---|---|")
        for batch in (1, 64):
            requests = [Request(generator.integers(2, VOCAB_SIZE, 32).astype(np.int32)) for _ in range(batch)]
            for engine in engines.values():
                timed(engine, requests, options.tokens)
            ratios = []
            for pair in range(options.pairs):
                order = (True, False) if pair % 2 else (False, True)
                seconds = {stamping: timed(engines[stamping], requests, options.tokens) for stamping in order}
                ratios.append(seconds[True] / seconds[False])
            low, high = interval(np.array(ratios))
            size = wire_bytes(engines[True], requests, options.tokens)
            print(
                f"| {batch} x {options.tokens} | {options.pairs} | {np.median(ratios):.3f} ({low:.3f} to {high:.3f}) "
                f"| 4 | {size:.2f} |", flush=True,
            )  # fmt: skip
        for engine in engines.values():
            engine.close()


if __name__ == "__main__":
    main()
