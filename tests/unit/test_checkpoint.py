"""Checkpoints: whole or not at all, found again, never written by two."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from r3 import checkpoint
from r3.checkpoint import Checkpoint, CheckpointStore, FileRecord, RunState, find, run_lock
from r3.config import Config, load_config
from r3.errors import CheckpointError, ConfigError
from r3.run import RunDirectory, read_rows


def state(step: int) -> RunState:
    return RunState(step=step, weight_version=step, skipped=0, ranks=2, seed=0, fingerprint="f" * 16)


def write_ranks(directory: Path) -> list[FileRecord]:
    """Stand in for two trainer ranks."""
    records = []
    for rank in range(2):
        file = directory / f"rank-{rank:05d}.pt"
        file.write_bytes(os.urandom(5000))
        records.append(FileRecord.of(file))
    return records


def saved(run: Path, *steps: int, keep: int = 9) -> CheckpointStore:
    store = CheckpointStore(run, keep)
    for step in steps:
        store.save(state(step), write_ranks)
    return store


def test_the_newest_is_found_with_its_state(tmp_path):
    store = saved(tmp_path, 5, 10, 100)
    found = store.newest()
    assert found == Checkpoint(tmp_path / "checkpoints" / "step-00000100", state(100))
    assert (tmp_path / "checkpoints" / "LATEST").read_text() == "step-00000100\n"
    assert find(tmp_path) == found
    assert find(tmp_path / "checkpoints" / "step-00000005").state.step == 5


def test_only_the_newest_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["LATEST", "step-00000003", "step-00000004"]


def truncate(path: Path) -> None:
    os.truncate(path / "rank-00001.pt", 4000)


def flip_a_byte(path: Path) -> None:
    file = path / "rank-00000.pt"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)


def edit_the_step(path: Path) -> None:
    file = path / "manifest.json"
    file.write_text(file.read_text().replace('"step": 2', '"step": 3'))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "rank-00001.pt has 4000 bytes, 5000 were written": truncate,
    "rank-00000.pt was changed": flip_a_byte,
    "manifest.json was changed": edit_the_step,
    "rank-00000.pt is missing": lambda path: (path / "rank-00000.pt").unlink(),
    "has no manifest.json": lambda path: (path / "manifest.json").unlink(),
    "manifest.json cannot be read": lambda path: (path / "manifest.json").write_text('{"format": 1, "sta'),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_one_is_passed_over_with_a_warning_and_refused_by_name(tmp_path, caplog, message):
    store = saved(tmp_path, 1, 2)
    damaged = tmp_path / "checkpoints" / "step-00000002"
    DAMAGES[message](damaged)
    with caplog.at_level(logging.WARNING, "r3"):
        found = store.newest()
    assert found is not None
    assert found.state.step == 1
    assert message in caplog.text
    with pytest.raises(CheckpointError, match=message):
        find(damaged)


def test_a_deleted_latest_does_not_matter(tmp_path):
    store = saved(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000002")
    found = store.newest()
    assert found is not None
    assert found.state.step == 1


KILLED = """
import os, sys
from pathlib import Path
from r3 import checkpoint
from tests.unit.test_checkpoint import saved, state, write_ranks
run, calls = Path(sys.argv[1]), int(sys.argv[2])
saved(run, 1)
def die_at(call, made=[0]):
    def wrapped(*args, **kwargs):
        made[0] += 1
        if made[0] == calls:
            os._exit(9)
        return call(*args, **kwargs)
    return wrapped
os.rename, os.replace, os.fsync, os.mkdir = map(die_at, (os.rename, os.replace, os.fsync, os.mkdir))
Path.rename = die_at(Path.rename)
saved(run, 2)
"""


def test_a_kill_at_any_call_leaves_a_complete_checkpoint(tmp_path):
    """Die at the n-th call that changes names or synchronises, for every n, until nothing is left to die at."""
    steps = []
    for calls in range(1, 40):
        run = tmp_path / str(calls)
        done = subprocess.run([sys.executable, "-c", KILLED, str(run), str(calls)], check=False)
        found = CheckpointStore(run, 9).newest()
        assert found is not None
        steps.append(found.state.step)
        if done.returncode == 0:
            break
        assert done.returncode == 9
        saved(run, 3)
        assert not list((run / "checkpoints").glob(".*")), "what the killed writer left is cleared by the next save"
    assert len(steps) > 8
    assert steps == sorted(steps), "once the new one is complete it stays so"
    assert steps[0] == 1
    assert steps[-1] == 2


def test_a_full_disk_keeps_the_old_one(tmp_path, monkeypatch):
    store = saved(tmp_path, 1)

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "sync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*earlier checkpoints are untouched"):
        store.save(state(2), write_ranks)
    monkeypatch.undo()
    found = store.newest()
    assert found is not None
    assert found.state.step == 1
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_two_writers_are_refused(tmp_path):
    with run_lock(tmp_path):
        code = (
            "import sys; from pathlib import Path; from r3.checkpoint import run_lock\n"
            f"with run_lock(Path({str(tmp_path)!r})): pass"
        )
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"in use by process {os.getpid()} on" in second.stderr
    with run_lock(tmp_path):
        pass


def test_going_back_hides_what_came_later(tmp_path):
    store = saved(tmp_path, 1, 2, 3)
    assert len(store.leave_behind(1)) == 2
    found = store.newest()
    assert found is not None
    assert found.state.step == 1


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_nothing_to_resume_is_said(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no such directory|no complete checkpoint"):
        find(tmp_path / name)


def a_run(path: Path) -> RunDirectory:
    run = RunDirectory.create(path, load_config(None, ["run.steps=8"]))
    for step in range(1, 8):
        run.log_metrics({"step": step})
    run.tokens.write_text('{"step": 1}\n{"step": 6}\n{"ste')
    with run.metrics.open("a") as file:
        file.write('{"step": 8, "rollout/rew')
    return run


def test_metrics_go_back_to_the_step_and_changed_keys_are_recorded(tmp_path):
    run = a_run(tmp_path / "run")
    RunDirectory.reopen(run.path, load_config(None, ["run.steps=12", "trainer.lr=1e-4"]), 5)
    assert [row["step"] for row in read_rows(run.tokens)] == [1]
    assert [row["step"] for row in read_rows(run.metrics)] == [1, 2, 3, 4, 5]
    event = read_rows(run.path / "events.jsonl")[-1]
    assert event["event"] == "resumed"
    assert event["changed"] == {"run.steps": [8, 12], "trainer.lr": [3e-4, 1e-4]}
    assert load_config(run.path / "config.resolved.yaml").run.steps == 12


@pytest.mark.parametrize("key", ["run.seed=1", "trainer.processes=2", "model=/other", "trainer.dtype=bfloat16"])
def test_another_model_seed_or_layout_is_another_run(tmp_path, key):
    run = a_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="cannot be resumed with another"):
        RunDirectory.reopen(run.path, load_config(None, ["run.steps=8", key]), 5)
    assert len(run.metrics.read_text().splitlines()) == 8


def test_overwrite_deletes_what_a_run_wrote_and_nothing_else(tmp_path):
    run = a_run(tmp_path / "run")
    saved(run.path, 1)
    (run.path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"--resume .*--overwrite"):
        RunDirectory.create(run.path, Config())
    RunDirectory.create(run.path, Config(), overwrite=True)
    assert {p.name for p in run.path.iterdir()} == {"notes.txt", "config.resolved.yaml", "status.json"}


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "r3.train", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--resume", "nowhere"], 5, "no run there"),
        (["--resume", "run"], 5, "holds no complete checkpoint"),
        (["--resume", "run/checkpoints/step-00000009"], 5, "no such directory"),
        (["--config", "grpo_qwen3moe", "--resume"], 5, "nothing matches"),
        (["--config", "grpo_qwen3moe", "--resume", "run.name=x"], 5, "runs/x-*"),
        (["--config", "grpo_qwen3moe", "--resume", "run", "run.dir=other"], 2, "drop one of the two"),
        (["--resume"], 2, "--config"),
        (["--resume", "run", "--overwrite"], 2, "not allowed with"),
        (["--config", "grpo_qwen3moe", "run.dir=run"], 2, "--overwrite"),
    ],
)  # fmt: skip
def test_the_command_refuses_with_one_message_and_a_code(tmp_path, arguments, code, message):
    a_run(tmp_path / "run")
    result = command(*arguments, cwd=tmp_path)
    assert (result.returncode, "Traceback" in result.stderr) == (code, False), result.stderr
    assert message in result.stderr


def test_a_torn_checkpoint_named_on_the_command_line_is_an_error(tmp_path):
    run = a_run(tmp_path / "run")
    saved(run.path, 4, 5)
    truncate(run.path / "checkpoints" / "step-00000005")
    result = command("--resume", "run/checkpoints/step-00000005", cwd=tmp_path)
    assert result.returncode == 5
    assert "has 4000 bytes" in result.stderr
    assert len(run.metrics.read_text().splitlines()) == 8, "nothing was touched"


def test_a_busy_run_directory_is_an_error(tmp_path):
    run = a_run(tmp_path / "run")
    with run_lock(run.path):
        result = command("--config", "grpo_qwen3moe", "--overwrite", f"run.dir={run.path}", cwd=tmp_path)
    assert result.returncode == 5
    assert "in use by process" in result.stderr
    assert json.loads((run.path / "status.json").read_text())["state"] == "starting"
