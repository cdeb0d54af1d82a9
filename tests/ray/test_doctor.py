"""What only a started part can tell: the doctor's last two checks, and a run whose engine captures nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import refused, run_module
from tests.tiny_model import write_files
from tests.tiny_weights import write_weights

pytestmark = pytest.mark.ray
FAKE = (
    "task.kind=custom", "task.prompts=tests.fake_engine:make_prompt", "task.reward=tests.fake_engine:length_reward",
    "rollout.engine=tests.fake_engine:FakeEngine", "tracking.wandb=disabled", "rollout.prompts_per_step=8",
)  # fmt: skip


def last_checks(*overrides: str) -> tuple[int, dict[str, dict[str, str]]]:
    result = run_module("r3.doctor", "--json", *overrides)
    found = json.loads(result.stdout)
    return result.returncode, {check["name"]: check for check in found["checks"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(write_files(tmp_path_factory.mktemp("model")))


def test_the_doctor_starts_ray_and_the_engine(model: Path) -> None:
    code, found = last_checks(*FAKE, f"model={model}")
    assert code == 0, found
    assert "ran a task in process" in found["ray"]["detail"]
    assert found["engine"]["detail"].startswith("fake 1 started, capture on: ")


@pytest.mark.slow
def test_the_doctor_finds_an_engine_that_does_not_capture(model: Path) -> None:
    code, found = last_checks(*FAKE, f"model={model}", "rollout.engine_args={capture_off: true}")
    assert code == 4
    assert found["ray"]["state"] == "ok"
    assert found["engine"]["state"] == "FAIL"
    assert "fake 1 runs without routing capture" in found["engine"]["detail"]


@pytest.mark.megatron
def test_a_run_ends_with_4_when_the_engine_turns_out_not_to_capture(tmp_path: Path, model_a: Path) -> None:
    result = run_module(
        "r3.train", "--config", "grpo_qwen3moe", *FAKE, f"model={model_a}", f"run.dir={tmp_path}/run",
        "rollout.engine_args={capture_off: true}",
    )  # fmt: skip
    refused(result, 4, "fake 1 runs without routing capture; start it with enable_return_routed_experts")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 4)
