"""`scripts/bench/replay.py`: the three ways really run, and what its table makes of their seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench.replay import WAYS, Run, rows_of

pytestmark = pytest.mark.megatron
ROOT = Path(__file__).parents[2]


def test_the_script_runs_every_way_and_profiles_it(tmp_path: Path) -> None:
    out = tmp_path / "replay.json"
    command = [sys.executable, "scripts/bench/replay.py", "--tiny", "--rounds", "3", "--warm-up", "1", "--profile", "1"]
    done = subprocess.run([*command, "--out", out], cwd=ROOT, check=True, capture_output=True, text=True)
    found = json.loads(out.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["rounds"]["value"] == 3
    assert [len(found["environment"]["raw"][way]) for way in WAYS] == [3, 3, 3]
    for way in WAYS:
        first, step = (rows[f"{way}, {part}"]["value"] for part in ("fastest tenth of first passes", "step"))
        assert 0 < first < step
        assert rows[f"{way}, profile, all kernels"]["value"] > 0
    # Replay looks ids up and compares them, which operators of the first pass do.
    assert rows["r3, profile, kernels"]["value"] > rows["native, profile, kernels"]["value"]
    assert any(name.startswith("r3, profile, above off: aten::") for name in rows)
    assert "off" not in {name.split(", profile, above off")[0] for name in rows if "above off" in name}
    assert "fastest tenths of both halves" in done.stdout


def test_ratios_of_known_seconds() -> None:
    # Every second step of every way is held up, off in the update and r3 in the first pass.
    held = [0.0, 0.5] * 10
    rounds = [
        {
            "off": Run(1.0 + wait, 0.25, 100),
            "r3": Run(1.01 + wait, 0.26 + wait, 101),
            "native": Run(1.0, 0.25, 100),
        }
        for wait in held
    ]
    rows = {row["name"]: row for row in rows_of(rounds, 7)}
    whole = rows["r3, fastest tenths of both halves"]
    assert whole["value"] == pytest.approx(1010)
    assert whole["ratio"] == pytest.approx(1.01)
    assert whole["ci95"] == pytest.approx([1.01, 1.01])
    assert rows["off, fastest tenths of both halves"]["ci95"] == []
    assert rows["r3, fastest tenth of first passes"]["ratio"] == pytest.approx(0.26 / 0.25)
    assert rows["r3, fastest tenth of updates"]["ratio"] == pytest.approx(1)
    assert rows["native, step"]["ratio"] == pytest.approx(1 / 1.25)
    assert rows["r3, peak memory"]["ratio"] == pytest.approx(1.01)
    assert rows["r3, tokens of a step"]["value"] == 7
