"""Megatron-core's own RouterReplay, driven right, gives the gradients of ours; driven wrong it says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from r3.trainer.outcome import worst_difference
from r3.trainer.policy import Policy, RoutingUse
from r3.types import Batch, ModelSpec
from tests.gloo_pool import GlooPool
from tests.megatron.layouts import VPP, layout_config, run_layout
from tests.megatron.native import SPOILED, Spoiler, native_policy, run_native
from tests.megatron.test_replay import accumulate, make_policy
from tests.megatron.toys import make_batch, make_config, prepare

pytestmark = pytest.mark.megatron
FORCED = RoutingUse(force=True)


@pytest.fixture
def policies(single_rank: None, model_dir: Path) -> Iterator[tuple[Policy, Policy]]:
    """Ours and the native one, with full recompute; the native list is the process's, so it is emptied behind it."""
    from megatron.core.transformer.moe.router_replay import RouterReplay

    config = make_config(trainer={"recompute": "full"})
    yield make_policy(model_dir, config), native_policy(config, model_dir)
    RouterReplay.clear_global_router_replay_instances()


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return worst_difference(*({n: t.numpy() for n, t in side.items()} for side in (first, second)))[0]


def test_driven_right_it_gives_our_gradients(policies: tuple[Policy, Policy]) -> None:
    found = []
    for policy in policies:
        step, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
        found.append(accumulate(policy, step, microbatches, FORCED))
    assert found[0][0].loss == pytest.approx(found[1][0].loss, abs=1e-6)
    assert difference(found[0][1], found[1][1]) <= 1e-6
    ours, native = (policy.replay for policy in policies)
    ours.require_empty("after the step")
    assert len(native.held()) == 4, "the last microbatch's ids stay until the caller clears them"


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_it_runs_on_with_a_wrong_record(policies: tuple[Policy, Policy], spoil: Spoiler) -> None:
    """Ours refuses these before a model sees them (`test_limits.py`).

    In Megatron-core 0.19.2 the dispatcher fails on rows with an expert twice, without a word of routing.
    """
    _, native = policies
    step, microbatches = prepare(native, make_batch(native.arch.spec), 5)
    right = accumulate(native, step, microbatches, FORCED)[1]
    native.replay.clear()
    native.replay.spoil = spoil
    repeats = spoil is not SPOILED["shifted by one row"]
    if repeats and not version("megatron-core").startswith("0.16."):
        with pytest.raises(RuntimeError, match="split_with_sizes"):
            accumulate(native, step, microbatches, FORCED)
        return
    found = accumulate(native, step, microbatches, FORCED)[1]
    assert difference(found, right) > 1e-2


def test_a_pass_without_backward_spoils_the_next_one(policies: tuple[Policy, Policy]) -> None:
    for policy, moves in zip(policies, (False, True), strict=True):
        step, microbatches = prepare(policy, make_batch(policy.arch.spec), 12)
        right = accumulate(policy, step, microbatches, FORCED)
        if moves:
            policy.replay.clear()
        other = [replace(m, experts=m.experts[:, :, ::-1].copy()) for m in microbatches]
        policy.logprobs(other, step, FORCED)
        again = accumulate(policy, step, microbatches, FORCED)
        assert again[0].loss == pytest.approx(right[0].loss, abs=1e-7), "the loss does not show it"
        assert (difference(again[1], right[1]) > 1e-2) == moves


@pytest.mark.parametrize("layout", [{"pipeline_parallel": 2}, VPP], ids=["pp2", "pp2+vpp2"])
def test_driven_right_it_gives_our_gradients_in_pipelines(
    gloo_pool: GlooPool, model_dir: Path, layout: dict[str, Any]
) -> None:
    batch: Batch = make_batch(ModelSpec.from_directory(model_dir))
    config = layout_config(layout, 2, trainer={"recompute": "full", "micro_batch_size": 2})
    ours, native = (gloo_pool.run(run, config, model_dir, batch)[0] for run in (run_layout, run_native))
    assert native.loss == pytest.approx(ours.loss, abs=1e-6)
    assert worst_difference(native.gradients, ours.gradients)[0] <= 1e-5
