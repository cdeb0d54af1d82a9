#!/usr/bin/env python
"""Measure replay's own time inside a training step, and print the table of docs/layouts.md.

    python scripts/bench/replay_time.py
    python scripts/bench/replay_time.py --tokens 8192 --recompute full

A step is what the trainer does with one batch: lay out the microbatches, recompute the log-probs, one update. *Align*
is what `microbatch` takes with records more than without; *force and account* is what the passes take
(`train/replay_s`): records brought to the device, rows in the routers' order, ids widened to int64, scores gathered at
them, ids used and disagreements counted, the audit made. All in one run, so that the share depends little on the
machine's load; the median over the steps.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.distributed as dist

from r3.trainer import parallel
from r3.trainer.batching import StepBatch, share
from r3.trainer.feed import MicroBatches
from r3.trainer.model import Architecture
from r3.trainer.policy import Policy, RoutingUse
from r3.types import Batch, ModelSpec, Trajectory
from tests.megatron.toys import make_advantages, make_config, make_trace, write_model

LENGTH = 128
# The built-in model's sizes.
SIZES = {"hidden_size": 128, "head_dim": 64, "moe_intermediate_size": 64, "intermediate_size": 512}


def make_batch(spec: ModelSpec, tokens: int, routing: bool) -> Batch:
    """Return trajectories of 128 tokens, half of them response."""
    rng = np.random.default_rng(0)
    made = []
    for member in range(tokens // LENGTH):
        ids = rng.integers(0, spec.vocab_size, LENGTH).astype(np.int32)
        wide = np.argsort(rng.random((LENGTH - 1, len(spec.moe_layers), spec.num_experts)), -1)[..., : spec.top_k]
        trace = make_trace(spec, wide, ids) if routing else None
        logprobs = np.full(LENGTH // 2, -5, np.float32)
        made.append(Trajectory(0, member, ids, LENGTH // 2, logprobs, trace, 0.0, "stop", 0, spec.fingerprint))
    return Batch.pack(made)


def laid_out(policy: Policy, step: StepBatch, size: int) -> tuple[MicroBatches, float]:
    """Return the step's microbatches and the seconds that they took."""
    plan = share(step.trajectories, mini_steps=1, rank=0, world=1, micro_batch_size=size)
    made = MicroBatches(step, plan[0], policy.arch.spec, policy.form)
    list(made)
    return made, made.seconds


def one_step(policy: Policy, steps: tuple[StepBatch, StepBatch], size: int, audit: bool) -> tuple[float, float, float]:
    """Return the seconds of a whole step, of aligning, and of forcing and accounting in its two passes."""
    with_records, without = steps
    _, plain = laid_out(policy, without, size)
    begin = time.perf_counter()
    microbatches, aligned = laid_out(policy, with_records, size)
    use = RoutingUse(force=True)
    with microbatches.checks:
        old = policy.logprobs(microbatches, with_records, replace(use, audit=audit))
    update = policy.update(microbatches, with_records, old.logprobs, None, replace(use, compare=False))
    return time.perf_counter() - begin, aligned - plain, old.replay_s + update.replay_s


def measured(directory: Path, tokens: int, size: int, recompute: str, repeats: int, audit: bool) -> list[float]:
    """Return the medians of `one_step`, in milliseconds."""
    arch = Architecture.from_directory(directory)
    config = make_config(trainer={"micro_batch_size": size, "recompute": recompute})
    policy = Policy(config, arch, directory, updates=10 * repeats)
    batches = [make_batch(arch.spec, tokens, routing) for routing in (True, False)]
    steps = tuple(StepBatch.join([batch], make_advantages(batch), arch.spec) for batch in batches)
    one_step(policy, steps, size, audit)
    found = [one_step(policy, steps, size, audit) for _ in range(repeats)]
    return (1e3 * np.median(np.array(found), axis=0)).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048], help=f"tokens of a step, times of {LENGTH}")
    parser.add_argument("--recompute", nargs="+", default=["none", "full"], choices=["none", "full", "selective"])
    parser.add_argument("--micro-batch-size", type=int, default=16, help="trajectories of a microbatch")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-audit", action="store_true", help="leave the audit out, which every step of a run makes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parallel.join(dist.HashStore(), 0, 1, seed=0, timeout_s=60)
    print(
        "| tokens | recompute | step ms | align ms | force and account ms | replay's share |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as place:
        directory = write_model(Path(place) / "model", **SIZES)
        for tokens in options.tokens:
            for recompute in options.recompute:
                size, audit = options.micro_batch_size, not options.no_audit
                step, align, force = measured(directory, tokens, size, recompute, options.repeats, audit)
                share_of_step = (align + force) / step
                print(
                    f"| {tokens} | {recompute} | {step:.0f} | {align:.2f} | {force:.2f} | {share_of_step:.1%} |",
                    flush=True,
                )
    parallel.leave()


if __name__ == "__main__":
    main()
