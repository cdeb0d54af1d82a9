#!/usr/bin/env python
"""Compare replay with Megatron-core's own RouterReplay on the same records; print the tables of docs/layouts.md.

    python scripts/bench/native_replay.py

The native one is driven as its users drive it (`tests/megatron/native.py`): ids and REPLAY_FORWARD before a
microbatch's forward pass, REPLAY_BACKWARD behind it, cleared behind each pass; everything else of a pass is the same
code. Gradients are compared with a single process that recomputes no activation. Times and bytes are those of a
log-prob pass and an update over 2,048 tokens in four microbatches, in one process.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.distributed as dist

from r3.errors import RoutingError
from r3.trainer import parallel
from r3.trainer.batching import MicroBatch, StepBatch
from r3.trainer.model import Architecture
from r3.trainer.outcome import Rehearsal, worst_difference
from r3.trainer.policy import Policy, RoutingUse
from r3.trainer.routed import WIDE_BYTES
from r3.types import Batch, ModelSpec, Trajectory
from scripts.bench.replay_time import SIZES, laid_out
from scripts.bench.replay_time import make_batch as long_batch
from tests.gloo_pool import GlooPool
from tests.megatron.layouts import VPP, layout_config, run_layout
from tests.megatron.native import SPOILED, NativeReplay, native_policy, run_native
from tests.megatron.toys import gradients, make_advantages, make_batch, make_config, prepare, write_model

FORCED = RoutingUse(force=True)
LAYOUTS: dict[str, dict[str, Any]] = {"pp2": {"pipeline_parallel": 2}, "pp2+vpp2": VPP, "tp2": {"tensor_parallel": 2}}


def right(directory: Path) -> None:
    """Print both ones' differences to the single process, driven right."""
    batch = make_batch(ModelSpec.from_directory(directory))
    print("| layout, full recompute | R3: loss, gradient diff. | native: loss, gradient diff. |\n|---|---|---|")
    with GlooPool(1) as alone, GlooPool(2) as pool:
        plain = layout_config({}, 1, trainer={"packed": False, "micro_batch_size": 64})
        expected: Rehearsal = alone.run(run_layout, plain, directory, batch)[0]
        for name, changes in ({"one process": {}} | LAYOUTS).items():
            ranks = 1 if name == "one process" else 2
            config = layout_config(changes, ranks, trainer={"recompute": "full", "micro_batch_size": 2})
            cells = []
            for run in (run_layout, run_native):
                found = (alone if ranks == 1 else pool).run(run, config, directory, batch)[0]
                worst = worst_difference(found.gradients, expected.gradients)[0]
                cells.append(f"{abs(found.loss - expected.loss):.1e}, {worst:.1e}")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def costs(directory: Path, repeats: int) -> None:
    """Print own time, bytes of ids and what is left behind, at 2,048 tokens."""
    print("\n| | recompute | own time | most ids held | held behind the log-prob pass | held behind the step |")
    print("|---|---|---|---|---|---|")
    arch = Architecture.from_directory(directory)
    batch = long_batch(arch.spec, 2048, True)
    step = StepBatch.join([batch], make_advantages(batch), arch.spec)
    for recompute in ("none", "full"):
        config = make_config(trainer={"micro_batch_size": 4, "recompute": recompute})
        for name, policy in (
            ("R3", Policy(config, arch, directory, updates=100)),
            ("native", native_policy(config, directory)),
        ):
            microbatches, _ = laid_out(policy, step, 4)
            found = [cost_of_step(policy, step, microbatches) for _ in range(repeats + 1)][1:]
            seconds = np.median([one[0] for one in found])
            kib = [f"{size / 1024:.0f} KiB" for size in found[-1][1:]]
            print(f"| {name} | {recompute} | {1e3 * seconds:.1f} ms | {' | '.join(kib)} |", flush=True)


def cost_of_step(policy: Policy, step: StepBatch, microbatches: list[MicroBatch]) -> tuple[float, int, int, int]:
    """Return replay's seconds, the most bytes of ids held at once, and those held behind each of the two passes."""
    native = policy.replay if isinstance(policy.replay, NativeReplay) else None
    before = policy.logprobs(microbatches, step, FORCED)
    after_logprobs = native.held_bytes() if native else active_bytes(policy)
    if native:
        native.clear()
        native.peak_bytes = 0
    _, _, seconds = policy.accumulate(microbatches, step, before.logprobs, None, FORCED)
    after_step = native.held_bytes() if native else active_bytes(policy)
    most = native.peak_bytes if native else most_bytes(microbatches)
    if native:
        native.clear()
    return before.replay_s + seconds, most, after_logprobs, after_step


def active_bytes(policy: Policy) -> int:
    """Bytes that our context still holds."""
    active = policy.replay._active
    return 0 if active is None or active.routing.experts is None else active.routing.experts.nbytes


def most_bytes(microbatches: list[MicroBatch]) -> int:
    """Return what we hold at once: a microbatch's record, which its graph keeps for backward, and its ids as int64.

    Those of one layer alone where all would be too large.
    """
    experts = [m.experts for m in microbatches if m.experts is not None]
    wide = [array if 8 * array.size <= WIDE_BYTES else array[:, :, 0] for array in experts]
    return max(array.nbytes + 8 * ids.size for array, ids in zip(experts, wide, strict=True))


def wrong(directory: Path) -> None:
    """Print what each one does with a wrong record, and with a stale one."""
    print("\n| record | R3 | native |\n|---|---|---|")
    config = make_config(trainer={"recompute": "full"})
    policies = (
        Policy(config, Architecture.from_directory(directory), directory, updates=10),
        native_policy(config, directory),
    )
    step, microbatches = prepare(policies[0], make_batch(policies[0].arch.spec), 5)
    rights = [gradient_of(policy, step, microbatches) for policy in policies]
    for name, spoil in SPOILED.items():
        ours, native = policies
        native.replay.spoil = spoil
        native.replay.clear()
        loss, found = gradient_of(native, step, microbatches)
        native.replay.spoil = lambda ids: ids
        print(f"| {name} | {refusal(ours, name)} | {runs_on(loss, found, rights[1])} |", flush=True)
    print(f"| stale (a log-prob pass before the step) | {' | '.join(stale(p, step, microbatches) for p in policies)} |")


def gradient_of(policy: Policy, step: StepBatch, microbatches: list[MicroBatch]) -> tuple[float, dict[str, Any]]:
    sums, _, _ = policy.accumulate(microbatches, step, step.rollout_logprobs.astype(np.float64), None, FORCED)
    return sums.loss / sums.tokens, {name: tensor.numpy() for name, tensor in gradients(policy).items()}


def runs_on(loss: float, found: dict[str, Any], expected: tuple[float, dict[str, Any]]) -> str:
    worst = worst_difference(found, expected[1])[0]
    return f"runs; loss diff. {abs(loss - expected[0]):.1e}, gradient diff. {worst:.1e}"


def refusal(policy: Policy, fault: str) -> str:
    """Return the sentence with which a record with this fault is refused."""
    trajectory = make_batch(policy.arch.spec, 1, 1).trajectory(0)
    assert trajectory.routing is not None
    experts = trajectory.routing.experts.copy()
    if fault.startswith("short"):
        experts = experts[:-8]
    elif fault.startswith("shifted"):
        experts = np.roll(experts, 1, 0)
    else:
        experts[..., 1] = experts[..., 0]
    bad: Trajectory = replace(trajectory, routing=replace(trajectory.routing, experts=experts))
    try:
        prepare(policy, Batch.pack([bad]))
    except RoutingError as error:
        return f"refused: {error}"
    raise AssertionError(f"a record that is {fault} was accepted")


def stale(policy: Policy, step: StepBatch, microbatches: list[MicroBatch]) -> str:
    """Run log-probs on other records, then a step; nothing is cleared between."""
    if isinstance(policy.replay, NativeReplay):
        policy.replay.clear()
    expected = gradient_of(policy, step, microbatches)
    if isinstance(policy.replay, NativeReplay):
        policy.replay.clear()
    policy.logprobs([replace(m, experts=m.experts[:, :, ::-1].copy()) for m in microbatches], step, FORCED)
    try:
        return runs_on(*gradient_of(policy, step, microbatches), expected)
    except RuntimeError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="steps of which the median time is taken")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        directory = write_model(Path(place) / "small")
        right(directory)
        parallel.join(dist.HashStore(), 0, 1, seed=0, timeout_s=60)
        costs(write_model(Path(place) / "model", **SIZES), options.repeats)
        wrong(directory)
        parallel.leave()


if __name__ == "__main__":
    main()
