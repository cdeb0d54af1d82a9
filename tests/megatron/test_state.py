"""A rank that goes on from its saved state is, bit for bit, the rank that never stopped."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from r3.errors import CheckpointError
from r3.trainer.worker import TrainerWorker
from r3.types import ModelSpec
from tests.megatron.toys import joined_worker, make_advantages, make_batch, make_config, write_model

pytestmark = pytest.mark.megatron


def train(worker: TrainerWorker, spec: ModelSpec, *steps: int) -> dict[str, float]:
    """Train on the trajectories of each step and return the last step's metrics, times aside."""
    for step in steps:
        batch = make_batch(spec, seed=step)
        result = worker.step(step, make_advantages(batch, seed=step), False, batch)
    assert result is not None
    return {k: v for k, v in result.metrics.items() if not k.startswith("time/") and not k.endswith("_s")}


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return every leaf of nested containers by its path."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{name}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, inner in enumerate(value) for k, v in flat(inner, f"{name}/{i}").items()}
    return {name: value.clone() if torch.is_tensor(value) else value}


def everything(worker: TrainerWorker) -> dict[str, Any]:
    """Return all that decides the rank's future, by name."""
    policy = worker.policy
    return flat(
        {
            "model": [chunk.state_dict() for chunk in policy.chunks],
            "parameters": [p.detach() for chunk in policy.chunks for p in chunk.parameters()],
            "optimizer": policy.optimizer.state_dict(),
            "schedule": policy.schedule.num_steps,
            "lr": policy.optimizer.param_groups[0]["lr"],
            "version": worker.weight_version,
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state()[1],
            "python": random.getstate(),
        }
    )


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    def same(x: Any, y: Any) -> bool:
        if torch.is_tensor(x):
            return x.dtype == y.dtype and torch.equal(x, y)
        return bool(np.array_equal(x, y))

    assert a.keys() == b.keys()
    return [name for name in a if not same(a[name], b[name])]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_and_load_change_nothing_that_comes_after(model_dir: Path, tmp_path: Path, dtype: str) -> None:
    config = make_config(
        trainer={"dtype": dtype, "lr_decay": "cosine", "lr_warmup_steps": 2, "weight_decay": 0.1},
        grpo={"mini_steps": 2},
    )  # fmt: skip
    spec = ModelSpec.from_directory(model_dir)
    with joined_worker(config, model_dir) as worker:
        train(worker, spec, 1, 2)
        random.seed(7)
        np.random.seed(7)
        torch.manual_seed(7)
        record = worker.save_state(str(tmp_path))
        saved = everything(worker)
        uninterrupted = train(worker, spec, 3), everything(worker)
    assert record.name == "rank-00000.pt"
    with joined_worker(config, model_dir) as worker:
        assert len(differing(saved, {**saved, **everything(worker)})) > 100, "nothing is left to restore"
        assert worker.load_state(str(tmp_path)) == 2
        assert differing(saved, everything(worker)) == []
        resumed = train(worker, spec, 3), everything(worker)
    assert resumed[0] == uninterrupted[0]
    assert differing(resumed[1], uninterrupted[1]) == []
    assert differing(resumed[1], saved), "the step did nothing"


def test_a_changed_learning_rate_is_taken(model_dir: Path, tmp_path: Path) -> None:
    spec = ModelSpec.from_directory(model_dir)
    with joined_worker(make_config(), model_dir) as worker:
        train(worker, spec, 1)
        worker.save_state(str(tmp_path))
    with joined_worker(make_config(trainer={"lr": 2e-4}), model_dir, updates=99) as worker:
        worker.load_state(str(tmp_path))
        assert train(worker, spec, 2)["train/lr"] == pytest.approx(2e-4)


def test_another_model_or_a_missing_file_is_refused(model_dir: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", num_hidden_layers=2)
    with joined_worker(make_config(), other) as worker:
        worker.save_state(str(tmp_path))
    with joined_worker(make_config(), model_dir) as worker:
        with pytest.raises(CheckpointError, match="does not fit this model"):
            worker.load_state(str(tmp_path))
        with pytest.raises(CheckpointError, match="shared file system"):
            worker.load_state(str(tmp_path / "nowhere"))


def test_a_place_that_cannot_be_written_is_said(model_dir: Path, tmp_path: Path) -> None:
    with (
        joined_worker(make_config(), model_dir) as worker,
        pytest.raises(CheckpointError, match=r"cannot be written.*access to, run.dir"),
    ):
        worker.save_state(str(tmp_path / "nowhere"))
