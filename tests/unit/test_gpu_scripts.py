"""What runs on a GPU host: the condensed run, the table's intervals, metadata beside the tree, the suite's outcome."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import numpy as np
import pytest

from scripts._dist_info import write as write_metadata
from scripts.bench import job, table
from tests.made_up_run import make_run

ROOT = Path(__file__).parents[2]


def test_a_run_is_condensed_into_a_table(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=30)
    made = {"versions": {"python": "3.12.3", "torch": "2.11.0"}, "commit": None, "driver": "Linux x86_64, 4 cores"}
    node = {"count": 2, "cpus": 16.0, "gpus": 1.0, "gpu_kind": "H200"}
    run.log_event("environment", **made, nodes=[node | {"gpu_kind": None}])
    # The last one counts: a resumed run has one for each start.
    run.log_event("environment", **made, nodes=[node, {"count": 1, "cpus": 8.0, "gpus": 0, "gpu_kind": None}])
    command = [sys.executable, "scripts/bench/job.py", "--run", run.path, "--out", tmp_path / "job.json"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = json.loads((tmp_path / "job.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert found["environment"]["status"] == "done"
    assert found["environment"]["host"] == "2 x (1 H200 GPUs, 16 cores), 1 x (0 GPUs, 8 cores)"
    assert found["environment"]["versions"] == made["versions"]
    assert found["environment"]["commit"] == "unknown"
    assert rows["steps"]["value"] == 30
    first, last = rows["reward, first 5 steps"], rows["reward, last 5 steps"]
    assert first["ci95"][0] < first["value"] < first["ci95"][1] < last["ci95"][0]
    assert last["baseline"] == first["name"]
    assert last["ratio"] == pytest.approx(last["value"] / first["value"], rel=1e-4)
    assert rows["steps with both passes"]["value"] == 6
    ratio = rows["k3, r3 / native"]
    assert ratio["ci95"][0] <= ratio["value"] <= ratio["ci95"][1]
    assert 1 / 3 < ratio["value"] < 2 / 3, "1e-4 to 2e-4 over 3e-4"
    assert rows["disagreement inside the replayed pass, layer 3"]["value"] == pytest.approx(0.004)
    assert rows["time/generate_s, median"]["ratio"] == pytest.approx(0.5)
    assert rows["router/coverage, min over steps"]["value"] == 1


def test_a_run_that_does_not_say_what_it_was_made_with_gets_nothing_from_this_machine(tmp_path: Path) -> None:
    facts, _ = job.condense(make_run(tmp_path / "run", steps=6).path)
    assert (facts["host"], facts["versions"], facts["commit"]) == ("unknown", {}, "unknown")


def test_the_bootstrap_of_a_ratio_draws_both_sides_of_a_step_together() -> None:
    below = np.linspace(1, 9, 30)
    ratio, (low, high) = table.bootstrap(2 * below, below)
    assert (low, ratio, high) == pytest.approx((2, 2, 2))
    assert table.bootstrap([1.0, 2.0]) == (1.5, ())
    # One value that is far off moves a mean, and not a median.
    held_up = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 3.0]
    assert table.bootstrap(held_up)[0] > 1.2
    assert table.bootstrap(held_up, np.ones(7), np.median)[0] == 1
    assert table.bootstrap(np.zeros(4), np.array([0, 0, 0, 1.0])) == (0, ())


def test_metadata_beside_the_tree_name_the_entry_points(tmp_path: Path) -> None:
    found = Distribution.at(write_metadata(tmp_path))
    assert found.metadata["Name"] == "rollout-router-replay"
    assert {(entry.group, entry.name) for entry in found.entry_points} == {
        ("sglang.srt.platforms", "r3_cpu"),
        ("sglang.srt.plugins", "r3_provenance"),
    }
    assert any(need.startswith("sglang>=") and 'extra == "sglang"' in need for need in found.requires or ())


@pytest.fixture
def only_python(tmp_path: Path) -> dict[str, str]:
    """An environment whose `python3` is the tests' own, without a folder of packages."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "R3_SITE": "/nonexistent", "TMPDIR": str(tmp_path), "PYTHON": sys.executable}


def test_a_command_on_a_gpu_host_sees_the_tree_and_its_entry_points(only_python: dict[str, str]) -> None:
    text = "import r3, importlib.metadata as m; print(r3.__file__, *m.entry_points(group='sglang.srt.plugins'))"
    command = ["bash", "scripts/gpu_host.sh", sys.executable, "-c", text]
    shown = subprocess.run(command, cwd=ROOT, env=only_python, check=True, capture_output=True, text=True).stdout
    assert shown.startswith(f"{ROOT}/r3/__init__.py")
    assert "r3_provenance" in shown


def test_the_suite_says_in_a_line_what_became_of_a_step(tmp_path: Path, only_python: dict[str, str]) -> None:
    command = ["bash", "scripts/gpu_suite.sh", tmp_path / "out"]
    environment = only_python | {"STEPS": "model", "R3_CACHE": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("model")]
    assert "exit 1" in line
    assert "its warm start needs a GPU" in (tmp_path / "out" / "model.log").read_text()


def test_the_suite_runs_lanes_side_by_side_and_names_what_it_does_not_know(
    tmp_path: Path, only_python: dict[str, str]
) -> None:
    environment = only_python | {"CUDA_VISIBLE_DEVICES": ""}

    def suite(*lanes: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "scripts/gpu_suite.sh", tmp_path / "out", *lanes]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)

    done = suite("0=capture1,job2", "1=nonsense")
    assert done.returncode == 1
    said = [line.split() for line in done.stdout.splitlines()]
    assert ["capture1", "skipped", "needs", "1", "GPUs"] in said
    assert ["job2", "skipped", "needs", "2", "GPUs"] in said
    assert "nonsense: no such step; there are model tests" in done.stderr
    refused = suite("capture1")
    assert refused.returncode == 2
    assert "a lane is GPUS=STEP,STEP" in refused.stderr
