#!/usr/bin/env python
"""How far engine and trainer are apart, natively and under replay: runs `r3.mismatch` and condenses it into a table.

    python scripts/bench/consistency.py                                          # 200,000 tokens, one GPU
    python scripts/bench/consistency.py --tokens 2000 -- rollout.prompts_per_step=64
    python scripts/bench/consistency.py --study mismatch.json --commit abc1234   # an --out of r3.mismatch that is there

Rows of docs/benchmarks/consistency.json are `name, value, unit, baseline, ratio, ci95`, by prompts drawn anew (95 %
percentile bootstrap, 2,000 resamples). Anything behind `--` goes to `r3.mismatch` as an override.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from r3.environment import commit as this_commit
from scripts.bench.table import ROOT, Row, row, show, write

COLUMNS = {
    "k3": "nats", "k1": "nats", "abs_mean": "nats", "extreme_1p2": "share of tokens", "extreme_1p5": "share of tokens",
    "extreme_2": "share of tokens", "ess_sequence": "share", "disagree_token_layer": "share of (token, layer)",
    "disagree_token": "share of tokens",
}  # fmt: skip


def rows_of(study: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the table of what `r3.mismatch --out` wrote."""
    for one in study["rows"]:
        name = one["name"]
        yield row(f"{name}, tokens", one["tokens"], "tokens")
        for key, unit in COLUMNS.items():
            if key in one["values"]:
                found = one["values"][key]
                yield row(f"{name}, {key}", found["value"], unit, ci95=bounds_of(found))
    for name, found in study["factors"].items():
        if found is not None:
            yield row(name, found["value"], "", name.rpartition(" / ")[2], found["value"], bounds_of(found))


def bounds_of(found: Mapping[str, Any]) -> list[float]:
    """Return the interval of a value, nothing where there is none."""
    return [found[key] for key in ("low", "high") if found[key] is not None]


def facts_of(study: Mapping[str, Any], commit: str) -> dict[str, Any]:
    """Return what the study says of itself; versions and device are those of its own host."""
    models = {kind: one["model"] for kind, one in study["studies"].items()}
    first = next(iter(study["studies"].values()))
    versions = {key: value for key, value in first["trainer"].items() if key != "device"}
    engine = dict([first["engine"].split(" ", 1)])
    return {
        "host": first["trainer"]["device"], "versions": versions | engine, "commit": commit, "models": models,
        **study["setting"],
    }  # fmt: skip


def measure(options: argparse.Namespace, out: Path) -> int:
    """Run the study in a process of its own and return its exit code."""
    command = [sys.executable, "-m", "r3.mismatch", "--config", options.config, "--tokens", str(options.tokens)]
    command += ["--rows", "native,r3", "--out", str(out)]
    command += ["--dense", options.dense] if options.dense else []
    return subprocess.run([*command, *options.overrides], cwd=ROOT, check=False).returncode


def main() -> int:
    options = _parser().parse_args()
    code = 0
    with tempfile.TemporaryDirectory() as place:
        file = options.study
        if file is None:
            file = Path(place) / "mismatch.json"
            code = measure(options, file)
            if not file.is_file():
                return code or 1
        study = json.loads(file.read_text())
    rows = list(rows_of(study))
    write(options.out, facts_of(study, options.commit or this_commit() or "unknown"), rows)
    show(rows)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="grpo_qwen3moe_1gpu.yaml", help="as for r3.mismatch")
    parser.add_argument("--tokens", type=int, default=200_000, help="response tokens")
    parser.add_argument("--dense", metavar="MODEL", help="a dense twin too, such as builtin:qwen3-1b")
    parser.add_argument("--study", type=Path, help="what an earlier r3.mismatch wrote; nothing is started")
    parser.add_argument("--commit", help="of that study (default: this tree's)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "consistency.json")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="passed to r3.mismatch")
    return parser


if __name__ == "__main__":
    sys.exit(main())
