"""Two gloo ranks compute what one process computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3.config import Config
from r3.trainer.model import Architecture
from r3.trainer.policy import Policy, RoutingUse
from r3.trainer.worker import TrainerWorker
from r3.types import Batch, ModelSpec
from tests.gloo_pool import GlooPool
from tests.megatron.test_convert import unflatten
from tests.megatron.toys import gradients, joined_worker, make_advantages, make_batch, make_config, prepare

pytestmark = pytest.mark.megatron
RECOMPUTE = {"recompute": "full"}
Gradients = dict[str, np.ndarray]


def gradient_of_rank(config: Config, directory: Path, batch: Batch, size: int) -> tuple[tuple[float, float], Gradients]:
    """Runs in every rank: token and loss sums of its share, and the reduced gradient."""
    import torch.distributed as dist

    policy = Policy(config, Architecture.from_directory(directory), directory, updates=10)
    step, microbatches = prepare(policy, batch, size, dist.get_rank(), dist.get_world_size())
    old = step.rollout_logprobs.astype(np.float64)
    sums, _, _ = policy.accumulate(microbatches, step, old, None, RoutingUse(force=True))
    return (sums.tokens, sums.loss), {name: gradient.numpy() for name, gradient in gradients(policy).items()}


def step_of_rank(config: Config, directory: Path, batch: Batch) -> tuple[dict[str, float] | None, Gradients | None]:
    """Runs in every rank: the metrics of one step and the weights behind it, on rank 0."""
    import torch.distributed as dist

    worker = TrainerWorker(config, str(directory), dist.get_rank(), dist.get_world_size(), 10)
    # The pool has joined already; a worker of its own would do it in `join`.
    worker.policy = Policy(config, Architecture.from_directory(directory), directory, updates=10)
    return report_of(worker, batch)


def report_of(worker: TrainerWorker, batch: Batch) -> tuple[dict[str, float] | None, Gradients | None]:
    result, exported = worker.step(1, make_advantages(batch), True, batch), worker.export()
    if result is None or exported is None:
        return None, None
    timed = ("_s", "tokens_per_s")
    metrics = {key: value for key, value in result.metrics.items() if not key.endswith(timed)}
    return metrics, {name: tensor.numpy() for name, tensor in unflatten(exported).items()}


@pytest.mark.parametrize(
    ("trainer", "groups", "members", "size"),
    [({}, 4, 3, 4), (RECOMPUTE, 4, 3, 2), ({}, 1, 3, 1)],
    ids=["even", "full recompute", "an empty microbatch on one rank"],
)
@pytest.mark.usefixtures("single_rank")
def test_gradients_equal_one_process(
    gloo_pool: GlooPool, model_dir: Path, trainer: dict[str, Any], groups: int, members: int, size: int
) -> None:
    config = make_config(trainer=trainer)
    batch = make_batch(ModelSpec.from_directory(model_dir), groups, members)
    (tokens, loss), expected = gradient_of_rank(config, model_dir, batch, size)
    ranks = gloo_pool.run(gradient_of_rank, config, model_dir, batch, size)
    assert min(rank[0][0] for rank in ranks) > 0
    assert sum(rank[0][0] for rank in ranks) == tokens
    assert sum(rank[0][1] for rank in ranks) / tokens == pytest.approx(loss / tokens, abs=1e-6)
    for _, found in ranks:
        for name, gradient in expected.items():
            scale = np.abs(gradient).max()
            assert np.abs(found[name] - gradient).max() <= 1e-5 * scale, name


@pytest.mark.parametrize("mini_steps", [1, 2])
def test_a_step_reports_and_does_the_same(gloo_pool: GlooPool, model_dir: Path, mini_steps: int) -> None:
    config = make_config(
        grpo={"mini_steps": mini_steps, "kl_coef": 0.01},
        rollout={"dtype": "float32"},
        metrics={"counterfactual_r2": True},
    )
    batch = make_batch(ModelSpec.from_directory(model_dir), groups=4, members=3)
    with joined_worker(config, model_dir) as worker:
        expected, weights = report_of(worker, batch)
    assert expected is not None
    assert weights is not None
    (found, moved), nothing = gloo_pool.run(step_of_rank, config, model_dir, batch)
    assert nothing == (None, None)
    assert found.keys() == expected.keys()
    # Pads depend on how samples are dealt to the ranks; everything else does not.
    for key in expected.keys() - {"router/pad_rows", "router/native_rows"}:
        assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key
    # AdamW turns a gradient that is all rounding error into a full step of either sign: a few elements may differ.
    off = np.concatenate([np.abs(moved[name] - weights[name]).reshape(-1) > 2e-5 for name in weights])
    assert off.mean() < 1e-3
