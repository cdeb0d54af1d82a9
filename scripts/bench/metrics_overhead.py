#!/usr/bin/env python
"""Measure what the always-on metrics take of a training step: counterfactual passes off, everything else on.

    python scripts/bench/metrics_overhead.py
    python scripts/bench/metrics_overhead.py --tokens 8192 --repeats 30

*Routers*: what forced routers would have chosen, counting disagreement, used ids, expert loads and the audit's
overlaps, in router calls and behind microbatches. *Mismatch*: the sums over tokens. *Overlaps*: the audit's numbers and
alarms. *Reduce*: joining counters. *Driver*: alarms, early loads, the step's line in `metrics.jsonl`. *Tokens*: data of
single tokens, which one step in `metrics.tokens_every` keeps, spread over all of them. One process; each part is timed
inside the same steps that it is compared with, so that the share depends little on the machine's load. The step is that
of the trainer alone, without generation: a larger step only makes the share smaller. Means over whole rounds of
`metrics.tokens_every` steps.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from r3 import metrics
from r3.builtin import resolve_model
from r3.config import MetricsConfig, ModelConfig
from r3.run import RunDirectory
from r3.trainer import worker as worker_module
from r3.trainer.counting import PassCounts
from r3.trainer.replay import _Visit
from r3.trainer.tally import Tally
from r3.trainer.trace import TokenObserver, Trace
from r3.trainer.worker import TrainerWorker
from r3.types import ModelSpec
from r3.watch import Watch
from scripts.bench.replay_time import LENGTH, SIZES, make_batch
from tests.megatron.toys import joined_worker, make_advantages, make_config, write_model

PARTS = ("routers", "mismatch", "overlaps", "tokens", "reduce", "driver")
EVERY = MetricsConfig().tokens_every


class Stopwatch:
    """Seconds of each part of the step that is running."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return `call` with its time added to `part`."""

        def measured(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                self.seconds[part] += time.perf_counter() - begin

        return measured


def instrument(watch: Stopwatch) -> None:
    """Time every function that only measures."""
    for owner, name, part in (
        (_Visit, "account", "routers"),
        (PassCounts, "count", "routers"),
        (Tally, "counts", "reduce"),
        (worker_module, "counts_over_ranks", "reduce"),
        (metrics, "mismatch", "mismatch"),
        (metrics, "disagreement", "mismatch"),
        (metrics, "replay_health", "mismatch"),
        (TrainerWorker, "_overlaps", "overlaps"),
        (TrainerWorker, "_alarms", "overlaps"),
        (Trace, "of", "tokens"),
        (TokenObserver, "report", "tokens"),
        (RunDirectory, "log_tokens", "tokens"),
    ):
        setattr(owner, name, watch.timed(part, getattr(owner, name)))


def measured(directory: Path, tokens: int, size: int, repeats: int) -> np.ndarray[Any, Any]:
    """Return `[repeats, parts + 1]` milliseconds; the last column is the whole step."""
    spec = ModelSpec.from_directory(directory)
    measuring = {"on_alarm": "warn", "alarm_k3": 1e9, "tokens_every": EVERY}
    config = make_config(trainer={"micro_batch_size": size}, metrics=measuring)
    batch = make_batch(spec, tokens, True)
    run = RunDirectory.create(directory.parent / "run", config)
    alarms, stopwatch, rows = Watch(config, spec, run, lambda step, alarm: None), Stopwatch(), []
    instrument(stopwatch)

    def driver(result: Any) -> None:
        report = dict(result.metrics) | alarms.measure(result)
        alarms.check(report, result)
        run.log_metrics({"step": result.step, **report})

    def keep(result: Any) -> None:
        if result.tokens is not None:
            run.log_tokens(result.tokens)

    finish = stopwatch.timed("driver", driver)
    with joined_worker(config, directory, updates=10 * repeats) as worker:
        for step in range(1, repeats + EVERY + 1):
            stopwatch.seconds.update(dict.fromkeys(PARTS, 0.0))
            begin = time.perf_counter()
            result = worker.step(step, make_advantages(batch), False, batch)
            finish(result)
            keep(result)
            rows.append([*stopwatch.seconds.values(), time.perf_counter() - begin])
    return 1e3 * np.array(rows[EVERY:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help=f"tokens of a step, a multiple of {LENGTH}")
    parser.add_argument("--micro-batch-size", type=int, default=64, help="trajectories of a microbatch")
    parser.add_argument("--repeats", type=int, default=3 * EVERY, help=f"steps, a multiple of {EVERY}")
    options = parser.parse_args()
    if options.repeats % EVERY:
        parser.error(f"--repeats {options.repeats} is no multiple of metrics.tokens_every = {EVERY}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        directory = write_model(Path(place) / "model", **SIZES)
        texts = resolve_model("builtin:tiny-qwen3moe", target_reward=ModelConfig().warm_start_reward, seed=0)
        for file in texts.glob("tokenizer*"):
            shutil.copy(file, directory)
        rows = measured(directory, options.tokens, options.micro_batch_size, options.repeats)
    *parts, whole = rows.mean(axis=0)
    share = sum(parts) / whole
    print("| tokens | step ms | " + " ms | ".join(PARTS) + " ms | share |\n|" + "---|" * (len(PARTS) + 3))
    print(f"| {options.tokens} | {whole:.0f} | " + " | ".join(f"{part:.2f}" for part in parts) + f" | {share:.2%} |")


if __name__ == "__main__":
    main()
