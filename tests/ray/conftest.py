"""Configs of an engine without a model, for the rollout worker and pool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r3.config import Config
from tests.tiny_model import write_files


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Config]:
    """Config of a fake engine; keyword arguments are keys of `rollout`, except `faults` and `routing`'s."""

    def make(
        faults: dict[str, Any] | None = None,
        on_error: str = "fail",
        block_layers: int = 8,
        on_missing: str = "fail",
        **rollout: Any,
    ) -> Config:
        return Config.model_validate(
            {
                "task": {
                    "kind": "custom",
                    "prompts": "tests.fake_engine:make_prompt",
                    "reward": "tests.fake_engine:length_reward",
                },
                "rollout": {
                    "engine": "tests.fake_engine:FakeEngine",
                    "engine_args": faults or {},
                    "prompts_per_step": 8,
                    "start_timeout_s": 120,
                    "timeout_s": 120,
                }
                | rollout,
                "routing": {"on_error": on_error, "on_missing": on_missing, "block_layers": block_layers},
                "grpo": {"group_size": 3},
            }
        )

    return make
