"""The main job on one GPU: three steps of the shipped config with a small random model, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from r3.run import read_rows
from scripts._dist_info import write as write_metadata

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]


def test_three_steps_with_engine_and_trainer_on_one_gpu(model_dir: Path, tmp_path: Path) -> None:
    write_metadata(tmp_path / "metadata")
    command = [
        sys.executable, "-m", "r3.train", "--config", "grpo_qwen3moe_1gpu.yaml", f"model={model_dir}",
        f"run.dir={tmp_path / 'run'}", "run.steps=3", "run.eval_every=2", "task.eval_prompts=16",
        "rollout.prompts_per_step=8", "rollout.max_total_tokens=65536", "task.kind=custom",
        "task.prompts=tests.fake_engine:make_prompt", "task.reward=tests.fake_engine:length_reward",
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT), str(tmp_path / "metadata"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": path}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["router/coverage"] == 1
        assert row["router/mismatched_ids"] == 0
        assert row["router/missing_rows"] == 0
        assert row["mismatch/k3"] < 0.05
        assert "mismatch_native/k3" in row
        assert row["train/skipped_steps"] == 0
