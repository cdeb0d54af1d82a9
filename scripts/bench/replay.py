#!/usr/bin/env python
"""Measure what replay takes of a training step, beside Megatron-core's own RouterReplay; write a table.

    python scripts/bench/replay.py                                   # one GPU, builtin:qwen3moe-1b
    python scripts/bench/replay.py --tiny --out /tmp/replay.json     # proves the script, on a CPU

A step is what the trainer does with one batch: take samples and records out of it, lay out the microbatches and check
the content of their records, recompute the log-probs, one update. Three ways, interleaved, all on the same random
balanced routing, so that the experts' products are the same:

    off     the router chooses for itself (top-k), and ready ids on the device take the choice's place
    r3      the records are forced, counted and audited, as in every step of a run
    native  Megatron-core's RouterReplay (`tests/megatron/native.py`), which counts nothing; it is fed by the same
            microbatches, whose seals are checked for it, too

A round runs each way once, in an order by which every way follows every other. The ratio of a way is its median over
the median of `off`, with a 95 % bootstrap interval over rounds: a step that something else on the host held up would
move a mean by more than replay does. Where most steps are held up, the fastest tenth of each way (its 10th percentile)
says more than the median. The first pass (log-probs, with the checks) and the update are compared apart, too, and the
sum of both halves' fastest tenths: a step that was held up in one half still says something of the other. The table,
with the seconds of every round under `raw`, is written every `--write-every` seconds and at the end.

`--profile N` adds, behind the rounds, N steps of each way under torch's profiler: what its kernels take, how many there
are, and those in which a way differs most from `off` (operators, where there is no GPU).
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.distributed as dist

from r3.builtin import resolve_model
from r3.trainer import parallel
from r3.trainer.batching import MicroBatch, StepBatch, share
from r3.trainer.feed import MicroBatches
from r3.trainer.model import Architecture
from r3.trainer.policy import Policy, RoutingUse
from r3.trainer.replay import MicrobatchRouting, ReplayContext, router_order
from r3.trainer.tally import Tally
from r3.types import Batch, ModelSpec, Trajectory
from scripts.bench.table import Row, bootstrap, environment, row, show, write
from tests.megatron.native import NativeReplay, native_policy
from tests.megatron.toys import make_advantages, make_config, make_trace, write_model

WAYS = ("off", "r3", "native")
ORDERS = tuple(permutations(WAYS))
_SHOWN = 12  # kernels of a profile
_OUT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "replay.json"


@dataclass(frozen=True, slots=True)
class Run:
    """One step in one way: wall seconds, of which `first` until the log-probs are there and their records are checked,
    and the most bytes of GPU memory in it (0 on a CPU).
    """

    seconds: float
    first: float
    peak: int

    @property
    def update(self) -> float:
        return self.seconds - self.first


# What is compared: a step, and its two halves, as an update that something held up says nothing of the pass before it.
PARTS: dict[str, tuple[str, Callable[[Run], float]]] = {
    "step": ("steps", lambda run: run.seconds),
    "first pass": ("first passes", lambda run: run.first),
    "update": ("updates", lambda run: run.update),
}


class GivenRouting:
    """`ReplayContext`'s interface for the way `off`: ids are on the device before the step, nothing is counted."""

    def __init__(self, spec: ModelSpec, ids: Sequence[dict[int, torch.Tensor]]) -> None:
        # `ids`: for each microbatch of a pass, int64 [s * b, k] by layer.
        self._ids, self._active = ids, -1
        self.columns, self._spec, self._calls = tuple(range(len(spec.moe_layers))), spec, 0
        self._pads: torch.Tensor | None = None

    @contextmanager
    def measured(self, device: torch.device) -> Iterator[Tally]:
        self._calls = 0
        yield Tally.zero(self._spec, device)

    def run(self, routing: MicrobatchRouting, call: Callable[[], torch.Tensor], chunk: int = 0) -> torch.Tensor:
        index, pads = self._calls, routing.pads.T
        self._calls += 1
        self._active, self._pads = index, pads
        output = call()
        if output.requires_grad:
            output.register_hook(partial(self._enter_backward, index, pads))
        return output

    def _enter_backward(self, index: int, pads: torch.Tensor, gradient: torch.Tensor) -> None:
        self._active, self._pads = index, pads

    def pads(self) -> torch.Tensor | None:
        return self._pads

    def visit(self, layer: int) -> _Given:
        return _Given(self._ids[self._active][layer])


class _Given:
    def __init__(self, ids: torch.Tensor) -> None:
        self._ids = ids

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, groups: Any = None, group_topk: Any = None, default: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        default(scores, topk, groups, group_topk)
        return scores.gather(1, self._ids), self._ids

    def account(self, routing_map: torch.Tensor) -> None:
        """Nothing is counted."""


class Bench:
    """The three ways over one batch."""

    def __init__(self, directory: Path, options: argparse.Namespace) -> None:
        self._arch, self._size = Architecture.from_directory(directory), options.micro_batch_size
        trainer = {"micro_batch_size": self._size, "recompute": options.recompute, "dtype": options.dtype,
                   "experts": options.experts, "lr": 1e-6}  # fmt: skip
        config = make_config(trainer=trainer)
        self.ours = Policy(config, self._arch, directory, updates=10_000)
        self.native = native_policy(config, directory)
        batches = [make_batch(self._arch.spec, options.tokens, options.length, routing) for routing in (True, False)]
        self._with, self._without = ((batch, make_advantages(batch)) for batch in batches)
        self.tokens = len(batches[0].tokens)
        self._replay = self.ours.replay
        spec = self._arch.spec
        ids = [self._ids(one) for one in self._laid_out(self.ours, StepBatch.join([self._with[0]], None, spec))]
        self._given = GivenRouting(spec, ids)

    def run(self, way: str) -> Run:
        """Run one step."""
        policy = self.native if way == "native" else self.ours
        batch, advantages = self._without if way == "off" else self._with
        use = None if way == "off" else RoutingUse(force=True, audit=way == "r3")
        self._bind(self._given if way == "off" else self._replay)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        begin = _now()
        step = StepBatch.join([batch], advantages, self._arch.spec)
        microbatches = self._laid_out(policy, step)
        with microbatches.checks if way == "r3" else nullcontext():
            old = policy.logprobs(microbatches, step, use)
        first = time.perf_counter() - begin
        if isinstance(policy.replay, NativeReplay):
            policy.replay.clear()
        update = None if use is None else RoutingUse(force=True, compare=False)
        policy.update(microbatches, step, old.logprobs, None, update)
        seconds = _now() - begin
        if isinstance(policy.replay, NativeReplay):
            policy.replay.clear()
        return Run(seconds, first, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)

    def _bind(self, context: ReplayContext | GivenRouting) -> None:
        self.ours.replay = context  # type: ignore[assignment]
        for chunk in self.ours.chunks:
            for module in chunk.modules():
                if hasattr(module, "context") and hasattr(module, "topk"):
                    module.context = context

    def _laid_out(self, policy: Policy, step: StepBatch) -> MicroBatches:
        plan = share(step.trajectories, mini_steps=1, rank=0, world=1, micro_batch_size=self._size)
        return MicroBatches(step, plan[0], self._arch.spec, policy.form)

    def _ids(self, one: MicroBatch) -> dict[int, torch.Tensor]:
        assert one.experts is not None
        assert (one.recorded | one.filled).all()
        found = torch.from_numpy(one.experts).to(parallel.device())
        return {
            layer: router_order(found[:, :, column]).long() for column, layer in enumerate(self._arch.spec.moe_layers)
        }


def make_batch(spec: ModelSpec, tokens: int, length: int, routing: bool) -> Batch:
    """Return trajectories of `length` tokens, half of them response, with random balanced routing."""
    rng = np.random.default_rng(0)
    made = []
    for member in range(max(1, tokens // length)):
        ids = rng.integers(0, spec.vocab_size, length).astype(np.int32)
        wide = np.argsort(rng.random((length - 1, len(spec.moe_layers), spec.num_experts), np.float32), -1)
        trace = make_trace(spec, wide[..., : spec.top_k], ids) if routing else None
        logprobs = np.full(length // 2, -5, np.float32)
        made.append(Trajectory(0, member, ids, length - length // 2, logprobs, trace, 0.0, "stop", 0, spec.fingerprint))
    return Batch.pack(made)


def profiled(bench: Bench, steps: int) -> list[Row]:
    """Return the rows of what the device (without one, the CPU) works in a step of each way, by profile."""
    on_gpu = torch.cuda.is_available()
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for way in WAYS:
        with torch.profiler.profile(activities=[kind]) as profile:
            for _ in range(steps):
                bench.run(way)
        spent = (
            (one, one.self_device_time_total if on_gpu else one.self_cpu_time_total) for one in profile.key_averages()
        )
        # Of a GPU the profile has the host's calls, too; those take none of its time.
        found[way] = {one.key: (time / steps, one.count / steps) for one, time in spent if time > 0}
    base, rows = found["off"], []
    for way, parts in found.items():
        total, count = (sum(part[i] for part in parts.values()) for i in (0, 1))
        rows += [
            row(f"{way}, profile, all kernels", total / 1e3, "ms", "off, profile, all kernels",
                total / sum(part[0] for part in base.values())),
            row(f"{way}, profile, kernels", count, "count"),
        ]  # fmt: skip
        more = {key: parts.get(key, (0.0, 0.0))[0] - base.get(key, (0.0, 0.0))[0] for key in {*parts, *base}}
        for key in sorted(more, key=lambda key: -abs(more[key]))[: _SHOWN if way != "off" else 0]:
            rows.append(row(f"{way}, profile, above off: {key[:90]}", more[key] / 1e3, "ms"))
    return rows


def rows_of(rounds: Sequence[dict[str, Run]], tokens: int) -> list[Row]:
    """Return the table's rows."""
    rows = []
    for what, (many, part) in PARTS.items():
        rows += _compared(rounds, what, part, np.median)
        rows += _compared(rounds, f"fastest tenth of {many}", part, partial(np.quantile, q=0.1))
    rows += _compared(rounds, "fastest tenths of both halves", lambda run: (run.first, run.update), _sum_of_tenths)
    rows.append(row("r3, tokens of a step", tokens, "tokens"))
    rows.append(row("rounds", len(rounds), "rounds"))
    if rounds[0]["off"].peak:
        most = max(found["off"].peak for found in rounds)
        for way in WAYS:
            peak = max(found[way].peak for found in rounds)
            rows.append(row(f"{way}, peak memory", peak, "B", "off, peak memory", peak / most))
    return rows


def _compared(
    rounds: Sequence[dict[str, Run]], name: str, part: Callable[[Run], Any], middle: Callable[..., Any]
) -> list[Row]:
    base = [part(found["off"]) for found in rounds]
    rows = []
    for way in WAYS:
        seconds = [part(found[way]) for found in rounds]
        ratio, interval = bootstrap(seconds, base, middle)
        rows.append(row(f"{way}, {name}", 1e3 * float(middle(seconds)), "ms", f"off, {name}", ratio,
                        interval if way != "off" else ()))  # fmt: skip
    return rows


def _sum_of_tenths(halves: Any, axis: int = 0) -> Any:
    """Return the sum of the 10th percentiles of two halves, `[..., rounds, 2]`, over the rounds (`axis`)."""
    return np.quantile(halves, 0.1, axis=axis).sum(-1)


def tabled(out: Path, made: Row, rounds: Sequence[dict[str, Run]], tokens: int, more: Sequence[Row] = ()) -> list[Row]:
    """Write the table and return its rows, `more` behind those of the rounds."""
    rows = [*rows_of(rounds, tokens), *more]
    raw = {way: [round(one[way].seconds, 5) for one in rounds] for way in WAYS}
    raw |= {f"{way}, first pass": [round(one[way].first, 5) for one in rounds] for way in WAYS}
    write(out, made | {"raw": raw}, rows)
    return rows


def measured(bench: Bench, options: argparse.Namespace, made: Row, end: float) -> list[dict[str, Run]]:
    """Run the rounds and return them; none begins after `end` (`time.monotonic()`)."""
    # As a trainer rank does (`TrainerRank.join`): a walk through all modules takes a quarter of a step.
    gc.collect()
    gc.freeze()
    for _ in range(options.warm_up):
        for way in WAYS:
            bench.run(way)
    rounds: list[dict[str, Run]] = []
    written = time.monotonic()
    while len(rounds) < options.rounds and time.monotonic() < end:
        rounds.append({way: bench.run(way) for way in ORDERS[len(rounds) % len(ORDERS)]})
        # Not after each one: resampling takes longer than a round, with the GPU idle.
        if time.monotonic() - written > options.write_every:
            tabled(options.out, made, rounds, bench.tokens)
            written = time.monotonic()
    return rounds


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    options = _parser().parse_args()
    end = time.monotonic() + options.seconds
    torch.set_num_threads(1)
    parallel.join(dist.HashStore(), 0, 1, seed=0, timeout_s=600)
    with tempfile.TemporaryDirectory() as place:
        if options.tiny:
            directory = write_model(Path(place) / "model")
            options.tokens, options.length, options.micro_batch_size = 512, 64, 4
        else:
            directory = resolve_model(options.model, target_reward=0, seed=0)
        bench = Bench(directory, options)
        facts = {"model": "tiny" if options.tiny else options.model, "dtype": options.dtype,
                 "experts": options.experts, "recompute": options.recompute, "length": options.length,
                 "micro_batch_size": options.micro_batch_size}  # fmt: skip
        made = environment(**facts)
        rounds = measured(bench, options, made, end)
        if not rounds:
            sys.exit(f"no round fits into --seconds {options.seconds:g}")
        rows = tabled(options.out, made, rounds, bench.tokens)
        if options.profile:
            rows = tabled(options.out, made, rounds, bench.tokens, profiled(bench, options.profile))
        show(rows)
    parallel.leave()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--model", default="builtin:qwen3moe-1b", help="a built-in model (random) or a directory")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and batch, to see that it runs")
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a trajectory")
    parser.add_argument("--micro-batch-size", type=int, default=32, help="trajectories of a microbatch")
    parser.add_argument("--recompute", default="none", choices=["none", "full", "selective"])
    parser.add_argument("--experts", default="auto", choices=["auto", "sequential", "grouped"])
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=18)
    parser.add_argument("--warm-up", type=int, default=4, help="rounds that are not counted")
    parser.add_argument("--seconds", type=float, default=600, help="no new round begins after this")
    parser.add_argument("--write-every", type=float, default=30, help="seconds between two tables (default 30)")
    parser.add_argument(
        "--profile", type=int, default=0, metavar="N", help="steps of each way to profile (default none)"
    )
    parser.add_argument("--out", type=Path, default=_OUT)
    return parser


if __name__ == "__main__":
    main()
