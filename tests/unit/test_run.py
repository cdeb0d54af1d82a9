"""What a run leaves on disk, prints and draws, and what the command says when it cannot start."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from r3.config import Config, TrackingConfig, load_config
from r3.curves import draw_curves
from r3.errors import ConfigError
from r3.run import RunDirectory, read_rows
from r3.summary import summarise
from r3.tracking import Tracker, console_line, wandb_mode

COUNTERFACTUAL = {"mismatch_native/k3": 4e-4, "mismatch/extreme_1p5": 0.0, "mismatch_native/extreme_1p5": 0.01}
ROWS = [
    {
        "step": step,
        "rollout/reward_mean": 0.3 + step / 100,
        "mismatch/k3": 1e-4,
        "router/coverage": 1.0,
        "router/mismatched_ids": 0.0,
        "time/step_s": 2.0,
        "time/generate_s": 1.0,
        "time/train_s": 0.5,
        "time/weights_s": 0.1,
        **(COUNTERFACTUAL if step % 5 == 1 else {}),
        **({"eval/reward_mean": 0.4} if step == 1 else {}),
    }
    for step in range(1, 31)
]  # fmt: skip


def test_a_run_directory_is_never_overwritten(tmp_path):
    RunDirectory.create(tmp_path / "run", Config())
    with pytest.raises(ConfigError, match="not empty"):
        RunDirectory.create(tmp_path / "run", Config())


def test_the_resolved_config_loads_back(tmp_path):
    run = RunDirectory.create(tmp_path / "run", load_config(None, ["trainer.lr=1e-6"]))
    assert load_config(run.path / "config.resolved.yaml").trainer.lr == 1e-6


def test_status_is_replaced_whole(tmp_path):
    run = RunDirectory.create(tmp_path / "run", Config())
    run.write_status("failed", exit_code=3, error="RoutingError: row 1")
    status = json.loads((run.path / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    assert not list(run.path.glob("*.part"))


def test_the_tracker_writes_metrics_and_one_line_per_step(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = RunDirectory.create(tmp_path / "run", Config())
    tracker = Tracker(Config(), run)
    tracker.log(1, ROWS[0])
    tracker.log(2, ROWS[1])
    tracker.close(0)
    assert [row["step"] for row in read_rows(run.metrics)] == [1, 2]
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_failing_tracker_warns_once_and_never_stops_a_run(tmp_path, monkeypatch):
    class Broken:
        calls = 0

        def log(self, row):
            self.calls += 1
            raise OSError("no space left")

    broken = Broken()
    monkeypatch.setattr("r3.tracking.open_wandb", lambda config, path: broken)
    run = RunDirectory.create(tmp_path / "run", Config())
    tracker = Tracker(Config(), run)
    for row in ROWS[:3]:
        tracker.log(row["step"], row)
    assert broken.calls == 1
    assert len(read_rows(run.metrics)) == 3
    assert read_rows(run.path / "events.jsonl")[0]["event"] == "wandb_failed"


def test_a_tracker_that_cannot_finish_hides_no_outcome(tmp_path, monkeypatch):
    class Gone:
        def finish(self, exit_code):
            raise ConnectionResetError("Connection lost")

    monkeypatch.setattr("r3.tracking.open_wandb", lambda config, path: Gone())
    run = RunDirectory.create(tmp_path / "run", Config())
    Tracker(Config(), run).close(143)
    assert read_rows(run.path / "events.jsonl")[-1]["error"] == "Connection lost"


@pytest.mark.parametrize(
    ("config", "environ", "mode"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("online", {"WANDB_MODE": "disabled"}, "disabled"),
        ("disabled", {"WANDB_API_KEY": "k"}, "disabled"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
    ],
)
def test_wandb_mode_follows_the_environment_first(config, environ, mode, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wandb_mode(TrackingConfig(wandb=config), environ) == mode


def test_wandb_runs_offline_without_an_account(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = RunDirectory.create(tmp_path / "run", Config())
    tracker = Tracker(Config(), run)
    tracker.log(1, ROWS[0])
    tracker.close(0)
    assert list((run.path / "wandb").glob("offline-run-*/*.wandb"))


def test_the_line_shows_what_was_measured():
    line = console_line(3, 80, {"rollout/reward_mean": 0.5, "mismatch/k3": 1.5e-4})
    assert line == "step  3/80 | reward 0.500 | k3 1.50e-04"


def test_the_summary_puts_both_mismatches_side_by_side():
    lines = {line.name: line.value for line in summarise(ROWS, final_eval=0.6)}
    assert lines["sampled reward, 10-step means"] == "0.355 -> 0.555 (+0.200)"
    assert lines["held-out greedy reward"] == "0.400 -> 0.600 (+0.200)"
    assert lines["k3, mean over 6 steps with both"] == "replay 0.0001 | native 0.0004 (4.0x)"
    assert lines["coverage, minimum"] == "1"
    assert lines["mismatched ids, maximum"] == "0"


def test_the_summary_of_a_run_without_steps_is_short():
    assert [line.name for line in summarise([], None)] == ["steps"]


def test_curves_are_a_picture_with_something_on_it(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    draw_curves(ROWS, tmp_path / "full.png")
    draw_curves([], tmp_path / "empty.png")
    full, empty = imread(tmp_path / "full.png"), imread(tmp_path / "empty.png")
    assert full.shape == empty.shape
    assert (full != empty).mean() > 0.01


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--config", "nothing.yaml"], 2, "no config 'nothing.yaml'"),
        (["--config", "grpo_qwen3moe", "trainer.lrr=1"], 2, "did you mean trainer.lr?"),
        (["--config", "grpo_qwen3moe", "rollout.top_p=0.5"], 2, "sampled distribution"),
        (["--config", "grpo_qwen3moe", "model=/no/such/model"], 2, "/no/such/model"),
        ([], 2, "--config"),
    ],
)
def test_the_command_refuses_with_one_message_and_a_code(tmp_path, arguments, code, message):
    result = subprocess.run(
        [sys.executable, "-m", "r3.train", *arguments, *([f"run.dir={tmp_path}/run"] if arguments else [])],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_failed_run_leaves_its_code_in_the_status(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "r3.train", "--config", "grpo_qwen3moe", "model=/no/such", f"run.dir={tmp_path}/run"],
        capture_output=True, check=False,
    )  # fmt: skip
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert "/no/such" in status["error"]
