#!/usr/bin/env python
"""Count false alarms: send clean samples of real SGLang on a CPU through every default check of the rollout worker.

    python scripts/false_alarms.py --dtype float32 --samples 6000
    python scripts/false_alarms.py --dtype bfloat16 --samples 6000

A tiny random Mixture-of-Experts model, prompts of 2 to 60 tokens in groups of four, answers of 1 to 12 tokens (one
token in seven ends them), prefix cache on, new weights every few calls. Prints one JSON line; exit code 1 when anything
was raised or dropped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from r3.errors import R3Error
from r3.rollout.worker import RolloutWorker
from r3.types import Prompt
from tests import plugin_entry
from tests.real_engine import engine_config
from tests.tiny_model import VOCAB_SIZE, write_model

PROMPTS_PER_CALL, GROUP, CALLS_PER_UPDATE = 64, 4, 5


def prompts(seed: int) -> Iterator[tuple[Prompt, ...]]:
    """Yield the prompts of a call; half of them have been seen before."""
    generator = np.random.default_rng(seed)
    seen: list[Prompt] = []
    while True:
        fresh = [
            Prompt(len(seen) + i, "".join(map(chr, generator.integers(33, 127, int(length)))), "")
            for i, length in enumerate(generator.integers(2, 61, PROMPTS_PER_CALL // 2 if seen else PROMPTS_PER_CALL))
        ]
        old = [seen[int(i)] for i in generator.integers(0, len(seen), PROMPTS_PER_CALL - len(fresh))] if seen else []
        seen += fresh
        yield tuple(fresh + old)


def model_with_many_ends(directory: Path, seed: int) -> Path:
    """Write a random model that one token in seven ends, so that answers are of mixed length."""
    model = write_model(directory, seed)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(1, VOCAB_SIZE // 7))}))
    return model


def measure(dtype: str, wanted: int, provenance: str) -> dict[str, object]:
    """Generate at least `wanted` samples and return what the checks made of them."""
    found: dict[str, object] = {"dtype": dtype, "alarms": 0, "dropped": 0, "stale_rows": 0, "messages": []}
    samples = rows = cached = sampled = 0
    with tempfile.TemporaryDirectory() as folder:
        models = [model_with_many_ends(Path(folder) / str(seed), seed) for seed in range(2)]
        config = engine_config(
            routing={"provenance": provenance}, dtype=dtype, max_new_tokens=12, max_running_requests=256,
            max_total_tokens=65_536,
        )  # fmt: skip
        worker = RolloutWorker(config, str(models[0]), 0)
        found["provenance"] = worker.spec().provenance
        begin = time.perf_counter()
        for call, asked in enumerate(prompts(seed=0)):
            if samples >= wanted:
                break
            if call and call % CALLS_PER_UPDATE == 0:
                worker._engine.load_weights(models[call // CALLS_PER_UPDATE % 2], call)
            samples += len(asked) * GROUP
            try:
                report, _ = worker.generate(asked, 0, GROUP, call)
            except R3Error as error:
                found["alarms"] = int(str(found["alarms"])) + 1
                found["messages"] = [str(error), *found["messages"]][:5]  # type: ignore[misc]
                continue
            rows, cached = rows + report.routing_rows, cached + report.cached_tokens
            sampled += report.response_tokens
            found["dropped"] = int(str(found["dropped"])) + len(report.dropped)
            found["stale_rows"] = int(str(found["stale_rows"])) + report.stale_rows
        seconds = time.perf_counter() - begin
        worker.close()
    counts = {"samples": samples, "rows": rows, "response_tokens": sampled, "cached_tokens": cached}
    return counts | {"seconds": round(seconds, 1)} | found


def main() -> int:
    """Print the counts of one dtype."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--samples", type=int, default=6000)
    parser.add_argument("--provenance", choices=["require", "auto", "off"], default="require")
    options = parser.parse_args()
    plugin_entry.show()
    found = measure(options.dtype, options.samples, options.provenance)
    print(json.dumps(found))
    return 1 if found["alarms"] or found["dropped"] or found["stale_rows"] else 0


if __name__ == "__main__":
    sys.exit(main())
