#!/usr/bin/env python
"""Run the main job for some steps, or take a run that is there, and condense its metrics into a table.

    python scripts/bench/job.py --config grpo_qwen3moe_1gpu.yaml --steps 30
    python scripts/bench/job.py --run runs/grpo-qwen3moe-1gpu-20260101-120000 --out docs/benchmarks/job.json

Rewards are means over the first and the last sixth of the steps. Intervals are 95 % percentile bootstraps over steps;
that of a ratio draws both sides of a step together. Without replay (`native`) means: the same batches, in the passes
that `metrics.counterfactual_every` asks for. Host, versions and commit are those that the run names. Anything behind
`--` goes to `r3.train` as an override.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import yaml

from r3.run import RESOLVED, RunDirectory, read_rows
from scripts.bench.table import ROOT, Row, bootstrap, row, show, write

# Of a step's seconds; what is left is the driver's.
PARTS = ("generate_s", "train_s", "install_s", "weights_s")
EXTREME = ("extreme_1p2", "extreme_1p5", "extreme_2", "extreme_5")

Metrics = dict[str, float]


def rows_of(steps: Sequence[Metrics], final_eval: float | None = None) -> list[Row]:
    """Return the table of a run from the rows of its `metrics.jsonl`."""
    sixth = max(1, len(steps) // 6)
    first, last = ([step["rollout/reward_mean"] for step in part] for part in (steps[:sixth], steps[-sixth:]))
    name, other = f"reward, first {sixth} steps", f"reward, last {sixth} steps"
    rows = [row("steps", len(steps), "steps"), row(name, *_spread(first))]
    value, ci95 = bootstrap(last)
    rows.append(row(other, value, "", name, value / np.mean(first) if np.mean(first) else None, ci95))
    evaluated = [step["eval/reward_mean"] for step in steps if "eval/reward_mean" in step]
    if evaluated and final_eval is not None:
        rows.append(row("held-out greedy reward, before", evaluated[0], ""))
        rows.append(row("held-out greedy reward, after", final_eval, "", "held-out greedy reward, before"))
    return [*rows, *_mismatch(steps), *_disagreement(steps), *_health(steps), *_times(steps)]


def _spread(values: Sequence[float]) -> tuple[float, str, str, None, Sequence[float]]:
    value, ci95 = bootstrap(values)
    return value, "", "", None, ci95


def _mismatch(steps: Sequence[Metrics]) -> Iterator[Row]:
    both = [step for step in steps if "mismatch_native/k3" in step and "mismatch/k3" in step]
    if not both:
        return
    yield row("steps with both passes", len(both), "steps")
    for key, unit in [("k3", "nats"), ("abs_mean", "nats"), *((key, "share of tokens") for key in EXTREME)]:
        if not all(f"{kind}/{key}" in step for kind in ("mismatch_native", "mismatch") for step in both):
            continue
        native, replayed = ([step[f"{kind}/{key}"] for step in both] for kind in ("mismatch_native", "mismatch"))
        value, ci95 = bootstrap(native)
        yield row(f"{key}, native", value, unit, ci95=ci95)
        value, ci95 = bootstrap(replayed)
        yield row(f"{key}, r3", value, unit, ci95=ci95)
        if sum(native) > 0:
            ratio, ci95 = bootstrap(replayed, native)
            yield row(f"{key}, r3 / native", ratio, "", f"{key}, native", ratio, ci95)


def _disagreement(steps: Sequence[Metrics]) -> Iterator[Row]:
    for kind, text in (("native", "without replay"), ("shadow", "inside the replayed pass")):
        prefix = f"router/{kind}_disagree_"
        found = [step for step in steps if f"{prefix}token_layer" in step]
        if not found:
            continue
        for key in ("token_layer", "token"):
            if all(prefix + key in step for step in found):
                value, ci95 = bootstrap([step[prefix + key] for step in found])
                yield row(f"disagreement {text}, {key.replace('_', ' and ')}", value, "share", ci95=ci95)
        layers = sorted({int(key.rpartition("/")[2]) for step in found for key in step if f"{prefix}layer/" in key})
        for layer in layers:
            value, ci95 = bootstrap([step[f"{prefix}layer/{layer}"] for step in found])
            yield row(f"disagreement {text}, layer {layer}", value, "share of rows", ci95=ci95)


def _health(steps: Sequence[Metrics]) -> Iterator[Row]:
    for key, of in (("coverage", min), ("mismatched_ids", sum), ("missing_rows", max), ("alarms", sum)):
        values = [step[f"router/{key}"] for step in steps if f"router/{key}" in step]
        if values:
            yield row(f"router/{key}, {of.__name__} over steps", of(values), "")


def _times(steps: Sequence[Metrics]) -> Iterator[Row]:
    # The first step warms kernels, graphs and allocators up.
    warm = steps[1:] or steps
    total = float(np.median([step["time/step_s"] for step in warm]))
    yield row("step", total, "s")
    for key in (*PARTS, "counterfactual_s", "checks_s"):
        values = [step[f"time/{key}"] for step in warm if f"time/{key}" in step]
        if values:
            seconds = float(np.median(values))
            yield row(f"time/{key}, median", seconds, "s", "step", seconds / total)
    for key in ("train/replay_s", "transport/put_s", "transport/get_s"):
        values = [step[key] for step in warm if key in step]
        if values:
            yield row(f"{key}, median", float(np.median(values)), "s", "step", float(np.median(values)) / total)
    for key in ("rollout/tokens_per_s", "train/tokens_per_s"):
        values = [step[key] for step in warm if key in step]
        if values:
            yield row(f"{key}, median", float(np.median(values)), "tokens/s")


def condense(run: Path) -> tuple[dict[str, Any], list[Row]]:
    """Return what a run directory says of itself, and its table."""
    config = yaml.safe_load((run / RESOLVED).read_text())
    directory = RunDirectory(run)
    facts = made_with(directory.last_event("environment")) | {
        "run": config["run"]["name"],
        "model": config["model"]["path"],
        "rollout": {
            key: config["rollout"].get(key) for key in ("workers", "gpus_per_worker", "dtype", "prompts_per_step")
        },
        "trainer": {
            key: config["trainer"].get(key) for key in ("processes", "gpus_per_process", "dtype", "experts", "lr")
        },
        "group_size": config["grpo"]["group_size"],
        "status": json.loads((run / "status.json").read_text())["state"],
    }
    return facts, rows_of(read_rows(directory.metrics), directory.final_evaluation())


def made_with(event: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return host, versions and commit that a run names in its event `environment`, "unknown" where it has none."""
    if event is None:
        return {"host": "unknown", "versions": {}, "commit": "unknown"}
    nodes = [
        f"{node['count']} x ({node['gpus']:g} {node['gpu_kind'] or ''} GPUs, {node['cpus']:g} cores)".replace("  ", " ")
        for node in event["nodes"]
    ]
    return {"host": ", ".join(nodes), "versions": event["versions"], "commit": event["commit"] or "unknown"}


def train(options: argparse.Namespace, run: Path) -> int:
    """Run the job in a process of its own and return its exit code."""
    command = [sys.executable, "-m", "r3.train", "--config", options.config, f"run.steps={options.steps}"]
    done = subprocess.run([*command, f"run.dir={run}", *options.overrides], cwd=ROOT, check=False)
    return done.returncode


def main() -> int:
    options = _parser().parse_args()
    run, code = options.run, 0
    if run is None:
        run = options.dir or Path(tempfile.mkdtemp(prefix="r3-job-")) / "run"
        code = train(options, run)
        if not (run / "metrics.jsonl").is_file():
            return code or 1
    facts, rows = condense(run)
    write(options.out, facts, rows)
    show(rows)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="grpo_qwen3moe_1gpu.yaml", help="as for r3.train")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--dir", type=Path, help="run directory of the job (default: a temporary one)")
    parser.add_argument("--run", type=Path, help="a run that is there already; nothing is started")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "job.json")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="passed to r3.train")
    return parser


if __name__ == "__main__":
    sys.exit(main())
