"""The trainer on a GPU: forced routing is followed to the id, grouped experts are the sequential ones, no host sync."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from r3.trainer import policy as policies
from r3.trainer.architecture import Architecture
from r3.trainer.batching import StepBatch, microbatch, plan_step
from r3.trainer.counting import PassCounts
from r3.trainer.outcome import Rehearsal, worst_difference
from r3.trainer.policy import Policy, RoutingUse
from r3.trainer.rehearsal import rehearse
from tests.megatron.toys import make_advantages, make_batch, make_config

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_rank")]


# A ratio near the edge of the clip would be clipped in one dtype and not in another: the whole token's gradient.
UNCLIPPED = {"clip_low": 0.999, "clip_high": 1e6}


def run(directory: Path, **trainer: Any) -> Rehearsal:
    """One log-prob pass and one update on forced random records."""
    config = make_config(trainer=trainer, grpo=UNCLIPPED)
    policy = Policy(config, Architecture.from_directory(directory), directory, updates=10)
    spec = policy.arch.spec
    batch = make_batch(spec, groups=6, members=4)
    step = StepBatch.join([batch], make_advantages(batch), spec)
    plan, form = plan_step(step, config.trainer, 1, policy.form, policy.data)
    return rehearse(
        policy, step, [microbatch(step, samples, spec, form) for samples in plan[0]], RoutingUse(force=True)
    )


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("packed", [True, False])
def test_every_id_is_replayed(model_dir: Path, recompute: str, packed: bool) -> None:
    found = run(model_dir, dtype="bfloat16", recompute=recompute, packed=packed, distributed_optimizer=True)
    counts = found.counts
    assert counts.mismatched_ids == 0
    assert counts.replayed == counts.required > 0
    assert counts.missing == 0
    assert np.isfinite(found.loss)
    assert found.grad_norm > 0


def test_the_gpu_agrees_with_the_layout_without_packing_and_recompute_in_float32(model_dir: Path) -> None:
    plain = run(model_dir, packed=False)
    packed = run(model_dir, packed=True, recompute="full")
    np.testing.assert_allclose(packed.logprobs, plain.logprobs, atol=1e-3, rtol=0)
    assert packed.loss == pytest.approx(plain.loss, abs=1e-4)
    assert worst_difference(packed.gradients, plain.gradients)[0] < 5e-3


def test_grouped_experts_are_the_sequential_ones(model_dir: Path) -> None:
    exact = run(model_dir, experts="sequential")
    one, other = (run(model_dir, dtype="bfloat16", experts=kind) for kind in ("sequential", "grouped"))
    assert other.counts.mismatched_ids == 0
    np.testing.assert_allclose(other.logprobs, one.logprobs, atol=0.1, rtol=0)
    # Other sums in another order round otherwise; they must not round worse. All three walk through the same experts.
    errors = [float(np.abs(found.logprobs - exact.logprobs).mean()) for found in (one, other)]
    assert errors[1] < 1.5 * errors[0] < 0.05
    assert worst_difference(other.gradients, one.gradients)[0] < 0.1


def test_bfloat16_on_a_gpu_takes_grouped_experts_by_itself(model_dir: Path) -> None:
    config = make_config(trainer={"dtype": "bfloat16"})
    policy = Policy(config, Architecture.from_directory(model_dir), model_dir, updates=1)
    assert any(name.endswith("mlp.experts.fc1") for name, _ in policy.chunks[0].named_parameters())


@contextmanager
def no_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_no_pass_waits_for_the_device(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch raises where a call would synchronise: from the first microbatch to the end of counting.
    schedule, count, watched = policies.get_forward_backward_func(), PassCounts.count, []

    def passed(**given: Any) -> Any:
        watched.append(given["forward_only"])
        with no_waiting():
            return schedule(**given)

    def counted(self: PassCounts) -> None:
        with no_waiting():
            count(self)

    monkeypatch.setattr(policies, "get_forward_backward_func", lambda: passed)
    monkeypatch.setattr(PassCounts, "count", counted)
    config = make_config(trainer={"dtype": "bfloat16"})
    policy = Policy(config, Architecture.from_directory(model_dir), model_dir, updates=1)
    spec = policy.arch.spec
    batch = make_batch(spec)
    step = StepBatch.join([batch], make_advantages(batch), spec)
    plan, form = plan_step(step, config.trainer, 1, policy.form, policy.data)
    microbatches = [microbatch(step, samples, spec, form) for samples in plan[0]]
    found = policy.logprobs(microbatches, step, RoutingUse(force=True, audit=True))
    policy.update(microbatches, step, found.logprobs, None, RoutingUse(force=True, compare=False))
    assert found.counts.mismatched_ids == 0
    assert watched == [True, False]
