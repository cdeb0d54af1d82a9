#!/usr/bin/env python
"""Measure what docs/detection.md says: the cost of every structural check, and what the audit sees of wrong records.

    python scripts/docs/detection.py [--rows 32767] [--answers 256]

Prints two Markdown tables. The first times each check on one synthetic record of 48 layers x top-8 of 128 experts, as
the smallest of seven runs. The second runs the default job's model: answers of the bf16 SGLang CPU engine, changed in
a known way, given to the fp32 trainer, once in a pass without replay (the canary) and once in a step with replay.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from r3.advantage import advantages
from r3.audit import find_alarms
from r3.builtin import resolve_model
from r3.cluster import ray_cluster
from r3.config import Config, load_config
from r3.errors import RoutingError
from r3.routing import RoutingTrace, check_constant_layers, checksum, narrow, validate_rows
from r3.tasks import open_task
from r3.transport import BatchRef
from r3.types import Batch, ModelSpec, Trajectory
from tests.cases.payloads import (
    Corruption,
    Ids,
    foreign_rows,
    layers_swapped,
    one_layer_overwritten,
    physical_ids,
    rows_shifted,
    rows_shuffled,
)

LAYERS, TOP_K, EXPERTS = 48, 8, 128


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=32_767)
    options.add_argument("--answers", type=int, default=256)
    chosen = options.parse_args()
    table(("check", "ms", "ms per million ids"), costs(chosen.rows))
    head = ("record", "structural", "pass", "lag 0", "better of lag -1, +1", "lowest layer", "lowest window", "alarms")
    table(head, semantics(chosen.answers))


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> None:
    """Print a Markdown table row by row."""
    print("", "| " + " | ".join(head) + " |", "|" + "---|" * len(head), sep="\n")
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def costs(rows: int) -> Iterator[tuple[str, ...]]:
    """Yield the time of each check on one record of that many rows."""
    generator = np.random.default_rng(0)
    few = generator.random((1024, LAYERS, EXPERTS)).argsort(2)[:, :, :TOP_K].astype(np.int32)
    wide = few[generator.integers(0, len(few), rows)]
    tokens = generator.integers(0, 1000, rows + 1).astype(np.int32)
    layers = tuple(range(LAYERS))
    trace = RoutingTrace.record(wide, tokens, layers=layers, num_experts=EXPERTS, weight_version=0, engine="made up")
    checks: dict[str, Callable[[], object]] = {
        "range and narrowing, int32 to uint8": lambda: narrow(wide, EXPERTS),
        "shape, dtype, range, distinct ids": lambda: validate_rows(trace.experts, layers, EXPERTS),
        "layers that never change": lambda: check_constant_layers([trace.experts], layers),
        "crc32 over rows and tokens": lambda: checksum(trace.experts, tokens),
    }
    total = 0.0
    for name, check in checks.items():
        spent = min(timed(check) for _ in range(7))
        total += spent
        yield name, f"{1e3 * spent:.1f}", f"{1e9 * spent / wide.size:.2f}"
    yield "together", f"{1e3 * total:.1f}", f"{1e9 * total / wide.size:.2f}"


def timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def same(ids: Ids, other: Ids) -> Ids:
    return ids


def within_rows(ids: Ids, other: Ids) -> Ids:
    return ids[:, :, ::-1]


def late(ids: Ids, other: Ids) -> Ids:
    changed = ids.copy()
    cut = 9 * len(ids) // 10
    changed[cut:] = np.resize(other, ids.shape)[cut:]
    return changed


def filled(value: int, slots: int) -> Corruption:
    def fill(ids: Ids, other: Ids) -> Ids:
        changed = ids.astype(np.int32)
        changed[:, :, -slots:] = value
        return changed

    return fill


RECORDS: dict[str, Corruption] = {
    "correct": same,
    "order inside the rows reversed": within_rows,
    "rows one later": rows_shifted(1),
    "rows one earlier": rows_shifted(-1),
    "layers shifted by one": lambda ids, other: np.roll(ids, 1, axis=1),
    "two layers swapped": layers_swapped(1, 2),
    "another prompt's rows": foreign_rows,
    "rows shuffled": rows_shuffled,
    "physical ids": physical_ids,
    "one layer overwritten": one_layer_overwritten(0),
    "last tenth of the rows stale": late,
    "one slot filled with a valid id": filled(7, 1),
    "two slots filled with a valid id": filled(7, 2),
    "all zeros": filled(0, 4),
    "255 in two slots": filled(255, 2),
}


def semantics(answers: int) -> Iterator[tuple[str, ...]]:
    """Yield what both passes say of each kind of record."""
    from r3.rollout.pool import RolloutPool
    from r3.trainer.group import TrainerGroup

    # A rate that leaves the weights alone, so that every step starts from the same ones.
    overrides = ["trainer.lr=1e-12", "routing.on_alarm=warn", f"rollout.prompts_per_step={answers // 8}"]
    config = load_config("grpo_qwen3moe", overrides)
    model = resolve_model(config.model.path, target_reward=config.model.warm_start_reward, seed=config.run.seed)
    task = open_task(config.task)
    with (
        ray_cluster(config) as places,
        RolloutPool(config, model, place=places.rollout) as pool,
        TrainerGroup(config, model, place=places.trainer) as trainers,
    ):
        rollout = pool.generate([task.train_prompt(i) for i in range(answers // 8)], 1)
        credit = advantages(rollout.rewards, rollout.groups, config.grpo.advantage)
        samples = rollout.batches[0].get().trajectories()
        for name, change in RECORDS.items():
            try:
                batch = BatchRef.put(rewritten(samples, change, trainers.spec()))
            except RoutingError as error:
                yield name, f"refused: {str(error)[:60]}", *[""] * 6
                continue
            passes = {
                "canary": trainers.audit([batch]),
                "step": trainers.step(1, credit, False, [batch]).metrics,
            }
            for where, found in passes.items():
                yield name, "passes", where, *cells(config, found)


def cells(config: Config, found: dict[str, float]) -> tuple[str, ...]:
    layers = [value for key, value in found.items() if key.startswith("router/overlap_layer/")]
    rules = {alarm.rule for alarm in find_alarms(found, config.routing.min_overlap)}
    here, margin = found["router/lag0_overlap"], found["router/lag_margin"]
    numbers = (here, here - margin, min(layers), found["router/overlap_window_min"])
    return (*(f"{value:.3f}" for value in numbers), ", ".join(sorted(rules)) or "none")


def rewritten(samples: list[Trajectory], change: Corruption, spec: ModelSpec) -> Batch:
    """Return the samples with changed records, checked as an adapter and the worker check them."""
    made = []
    for i, sample in enumerate(samples):
        assert sample.routing is not None
        other = samples[i - 8].routing
        assert other is not None
        trace = RoutingTrace.record(
            change(sample.routing.experts, other.experts), sample.tokens,
            layers=spec.moe_layers, num_experts=spec.num_experts, weight_version=0, engine=sample.routing.engine,
        )  # fmt: skip
        made.append(replace(sample, routing=trace))
    batch = Batch.pack(made)
    check_constant_layers(batch.blocks[0].stored, spec.moe_layers)
    return batch


if __name__ == "__main__":
    main()
