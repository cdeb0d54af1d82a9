"""What replay does to the mismatch of a bf16 engine and an fp32 trainer, and that the metric sees broken records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3.audit import AuditError
from r3.canary import check_canary
from r3.config import Config, load_config
from r3.metrics import bootstrap_interval
from r3.routing import RoutingTrace
from r3.tasks import open_task
from r3.transport import BatchRef
from r3.types import Batch, Trajectory

pytestmark = pytest.mark.e2e
ROUNDS = 36


@dataclass
class Bridge:
    """Engine and trainer of one model, with a few thousand sampled answers."""

    config: Config
    audit: Callable[[list[Any]], dict[str, float]]
    batches: list[Any]
    tokens: list[int]


@pytest.fixture(scope="module")
def bridge(ray_session: None, warm_model: Path) -> Iterator[Bridge]:
    from r3.rollout.pool import RolloutPool
    from r3.trainer.group import TrainerGroup

    config = load_config("grpo_qwen3moe")
    task = open_task(config.task)
    with RolloutPool(config, warm_model) as pool, TrainerGroup(config, warm_model) as trainers:
        rollouts = [pool.generate([task.train_prompt(32 * r + i) for i in range(32)], r) for r in range(ROUNDS)]
        yield Bridge(
            config,
            lambda refs: dict(trainers.audit(refs)),
            [batch for rollout in rollouts for batch in rollout.batches],
            [rollout.response_tokens for rollout in rollouts],
        )


def test_replay_lowers_k3_of_a_bf16_engine(bridge: Bridge, record_property: Callable[[str, object], None]) -> None:
    assert sum(bridge.tokens) >= 50_000
    audits = [bridge.audit([batch]) for batch in bridge.batches]
    weights = np.array(bridge.tokens) / np.mean(bridge.tokens)
    replayed = np.array([audit["mismatch/k3"] for audit in audits]) * weights
    native = np.array([audit["mismatch_native/k3"] for audit in audits]) * weights
    low, high = bootstrap_interval(native - replayed)
    record_property("k3", {"replay": replayed.mean(), "native": native.mean(), "difference": (low, high)})
    assert low > 0
    assert all(audit["router/coverage"] == 1 and audit["router/mismatched_ids"] == 0 for audit in audits)
    assert all(audit["router/lag_margin"] > 0.2 for audit in audits)
    for audit in audits:
        check_canary(bridge.config, audit)


def shift(trajectories: list[Trajectory]) -> list[Trajectory]:
    """Give every token the experts of the one before it."""
    return [_rewritten(t, np.roll(_experts(t), 1, axis=0)) for t in trajectories]


def neighbour(trajectories: list[Trajectory]) -> list[Trajectory]:
    """Give every sequence the experts of another prompt's answer, where both have rows."""
    others = trajectories[8:] + trajectories[:8]
    swapped = []
    for mine, other in zip(trajectories, others, strict=True):
        experts = _experts(mine).copy()
        rows = min(len(experts), len(_experts(other)))
        experts[:rows] = _experts(other)[:rows]
        swapped.append(_rewritten(mine, experts))
    return swapped


def reverse(trajectories: list[Trajectory]) -> list[Trajectory]:
    """Give every layer the experts of its mirror image."""
    return [_rewritten(t, _experts(t)[:, ::-1]) for t in trajectories]


@pytest.mark.parametrize("defect", [shift, neighbour, reverse])
def test_wrong_records_raise_k3_a_hundredfold(bridge: Bridge, defect: Callable[..., Any]) -> None:
    batch = bridge.batches[0].get()
    right = bridge.audit([bridge.batches[0]])["mismatch/k3"]
    wrong = bridge.audit([BatchRef.put(Batch.pack(defect(batch.trajectories())))])
    assert wrong["mismatch/k3"] > 100 * right
    with pytest.raises(AuditError, match="the trainer's own top-k"):
        check_canary(bridge.config, wrong)
    if defect is shift:
        assert wrong["router/lag_margin"] < 0


def _experts(trajectory: Trajectory) -> np.ndarray:
    assert trajectory.routing is not None
    return trajectory.routing.experts


def _rewritten(trajectory: Trajectory, experts: np.ndarray) -> Trajectory:
    """A structurally perfect record, checksum included, of the wrong experts."""
    assert trajectory.routing is not None
    trace = RoutingTrace.record(
        experts,
        trajectory.tokens,
        layers=trajectory.routing.layers,
        num_experts=trajectory.routing.num_experts,
        weight_version=trajectory.weight_version,
        engine=trajectory.routing.engine,
    )
    return replace(trajectory, routing=trace)
