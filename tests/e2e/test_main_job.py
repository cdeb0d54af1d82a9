"""The command as a user runs it: real Ray, SGLang, Megatron-core and W&B, three steps, and what is left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from r3.run import read_rows
from tests import plugin_entry

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
REWARD = """
def prompts(index):
    return {"prompt": f"Spell this word backward (example: sun -> nus): {'abcde'[index % 5] * 3}", "answer": "x"}

def reward(prompt, response):
    assert prompt.answer == "x"
    return len(response) / 10
"""


def train(directory: Path, *overrides: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the shipped config for three steps."""
    command = [sys.executable, "-m", "r3.train", "--config", "grpo_qwen3moe.yaml", "run.steps=3"]
    command.append(f"run.dir={directory}")
    paths = os.pathsep.join(filter(None, [plugin_entry.folder(), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": paths}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.run(
        [*command, *overrides], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def replayed(warm_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with replay, two mini-steps, the counterfactual on every step and a KL penalty."""
    directory = tmp_path_factory.mktemp("e2e") / "run"
    result = train(
        directory, "metrics.counterfactual_every=1", "grpo.mini_steps=2", "run.eval_every=2", "grpo.kl_coef=0.01",
        "task.eval_prompts=32", "routing.save_every=2", "metrics.counterfactual_r2=true", "metrics.early_steps=2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return directory, result.stdout


def test_every_step_replays_every_recorded_row(replayed: tuple[Path, str]) -> None:
    rows = read_rows(replayed[0] / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["router/coverage"] == 1
        assert row["router/mismatched_ids"] == 0
        assert row["router/missing_rows"] == 0
        assert row["router/dropped_samples"] == 0
        assert row["router/lag_margin"] > 0.2
        assert row["router/lag0_overlap"] > 0.9
        assert row["router/audited_rows"] > 1000
        assert row["router/alarms"] == row["router/native_samples"] == 0
        assert 0 < row["time/checks_s"] < row["time/generate_s"]
        assert row["rollout/staleness_max"] == 0
        assert row["train/mini_steps"] == 2
        assert row["train/grad_norm"] > 0
        assert 0 <= row["mismatch/k3"] < 0.01
        assert 0 <= row["mismatch_native/k3"] < 0.05
        # 16 bytes a row, but the prompt rows of eight samples are stored once.
        assert 16 / 8 < row["transport/bytes_per_token"] < 16 / 2
    assert rows[0]["train/kl"] < rows[-1]["train/kl"]


def test_every_step_is_measured_three_ways_and_raises_no_alarm(replayed: tuple[Path, str]) -> None:
    rows = read_rows(replayed[0] / "metrics.jsonl")
    for row in rows:
        # Its own routing replayed under the same weights is the pass without replay.
        assert row["mismatch_r2/k3"] == pytest.approx(row["mismatch_native/k3"], rel=0.01)
        assert row["router/dead_layers"] == 0
        assert 1 < row["router/load_max_over_mean"] <= 4
        assert row["time/counterfactual_s"] > 0
        assert row["time/step_s"] > row["time/train_s"] + row["time/generate_s"]
    assert ["router/load_drift" in row for row in rows] == [False, False, True]
    assert 0 < rows[2]["router/load_drift"] < 0.3
    assert list(json.loads((replayed[0] / "expert_load.json").read_text())) == ["1", "2"]
    events = {row["event"] for row in read_rows(replayed[0] / "events.jsonl")}
    assert not events & {"metrics_alarm", "routing_alarm"}


def test_records_of_every_second_step_are_saved_and_sound(replayed: tuple[Path, str]) -> None:
    directory, _ = replayed
    assert [path.name for path in (directory / "routing").iterdir()] == ["step-00000002.r3"]
    shown = subprocess.run(
        [sys.executable, "-m", "r3.inspect", directory, "--json"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    (file,) = json.loads(shown.stdout)["files"]
    assert len(file["records"]) == 32 * 8
    assert all(record["rows"] == record["tokens"] - 1 for record in file["records"])
    assert {span["weight_version"] for record in file["records"] for span in record["spans"]} == {1}


def test_the_run_directory_is_complete(replayed: tuple[Path, str], warm_model: Path) -> None:
    directory, output = replayed
    assert json.loads((directory / "status.json").read_text())["state"] == "done"
    events = {row["event"]: row for row in read_rows(directory / "events.jsonl")}
    made = events["environment"]
    assert {"python", "r3", "torch", "ray", "sglang", "megatron-core"} <= set(made["versions"])
    assert [(node["count"], node["gpus"]) for node in made["nodes"]] == [(1, 0)]
    (engines,) = events["engines"]["found"]
    assert re.fullmatch(r"\d x sglang 0\.5\.\d+, provenance exact; rows come through shared memory", engines)
    assert f"\n{engines}\n" in output
    assert "rows_not_shared" not in events
    assert events["canary"]["router/coverage"] == 1
    assert events["rollout_canary"]["equal_rows"] > 0.9
    assert (directory / "config.resolved.yaml").is_file()
    assert (directory / "curves.png").stat().st_size > 10_000
    assert list((directory / "wandb").glob("offline-run-*/*.wandb"))
    assert len(re.findall(r"^step \d/3 \|", output, re.MULTILINE)) == 3
    assert "k3, mean over 3 steps with both" in output
    assert "held-out greedy reward" in output


def test_the_trained_checkpoint_loads_and_differs(replayed: tuple[Path, str], warm_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = AutoModelForCausalLM.from_pretrained(replayed[0] / "hf", dtype=torch.float32)
    before = dict(AutoModelForCausalLM.from_pretrained(warm_model, dtype=torch.float32).named_parameters())
    changes = {name: float((p - before[name]).abs().max()) for name, p in trained.named_parameters()}
    assert min(changes.values()) > 0, "a parameter was not trained"
    assert max(changes.values()) < 0.1
    assert AutoTokenizer.from_pretrained(replayed[0] / "hf").chat_template


def test_every_key_that_is_logged_is_documented(replayed: tuple[Path, str]) -> None:
    logged = {key for row in read_rows(replayed[0] / "metrics.jsonl") for key in row if key != "step"}
    text = (ROOT / "docs" / "metrics.md").read_text()
    documented = set()
    for line in text.splitlines():
        if line.startswith("| `"):
            names = re.findall(r"`([^`]+)`", line.split("|")[1])
            section = names[0].rpartition("/")[0]
            stem = names[0].rpartition("_")[0]
            for name in names:
                whole = "/" in name
                documented.add(name if whole else f"{stem}{name}" if name.startswith("_") else f"{section}/{name}")
    patterns = [re.escape(key).replace(r"<i>", r"\d+").replace(r"\*", ".*") for key in documented]
    assert not [key for key in logged if not any(re.fullmatch(pattern, key) for pattern in patterns)]
    absent = [key for key, p in zip(documented, patterns, strict=True) if not any(re.fullmatch(p, k) for k in logged)]
    assert not absent


@pytest.mark.slow
def test_a_record_that_is_off_by_one_stops_the_command_before_the_first_step(warm_model: Path, tmp_path: Path) -> None:
    result = train(
        tmp_path / "run", "rollout.engine=tests.corrupting_engine:ShiftedRows", "run.eval_every=0",
        "rollout.prompts_per_step=8",
    )  # fmt: skip
    sentence = "the record fits better shifted by one token: overlap with the trainer's own top-k is 0."
    assert result.returncode == 3, result.stderr
    assert f"error: the start-up canary failed: {sentence}" in result.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    alarms = [row for row in read_rows(tmp_path / "run" / "events.jsonl") if row["event"] == "routing_alarm"]
    assert (alarms[0]["step"], alarms[0]["rule"]) == (0, "lag")
    assert alarms[0]["value"] < alarms[0]["threshold"]
    assert alarms[0]["sentence"].startswith(sentence)


@pytest.mark.slow  # its parts one by one: tests/megatron/test_{group,worker}.py, tests/unit/test_{command,tasks}.py
def test_without_replay_two_ranks_and_an_own_reward(warm_model: Path, tmp_path: Path) -> None:
    (tmp_path / "my_rules.py").write_text(REWARD)
    (tmp_path / "trainer.py").write_text("raise RuntimeError('the user has a trainer of his own')")
    result = train(
        tmp_path / "run", "replay.mode=none", "trainer.processes=2", "run.eval_every=0", "task.kind=custom",
        "task.prompts=my_rules:prompts", "task.reward=my_rules:reward", "task.heldout_fraction=0.5", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 3
    for row in rows:
        assert "router/coverage" not in row
        assert row["router/native_disagree_token_layer"] < 0.2
        assert 0 <= row["mismatch/k3"] < 0.05
        assert np.isclose(row["rollout/reward_mean"] * 10, round(row["rollout/reward_mean"] * 10, 6))
        assert row["rollout/reward_mean"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ipc", "broadcast"])
def test_weights_take_the_way_that_was_asked_for(warm_model: Path, tmp_path: Path, way: str) -> None:
    result = train(
        tmp_path / "run", "run.steps=2", f"weights.transport={way}", "weights.bucket_mib=1", "run.eval_every=0",
        "rollout.prompts_per_step=8", "grpo.group_size=4", "run.checkpoint_every=1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert 0 <= row["mismatch/k3"] < 0.01, "the engine answered with other weights than the trainer's"
        assert row["rollout/staleness_max"] == 0
        assert row["transport/weights_bytes"] > row["transport/weights_extra_bytes"] > 0
        assert row["transport/weights_gb_per_s"] > 0
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["transports"] for event in events if event["event"] == "weights_transport"] == [[way]]
