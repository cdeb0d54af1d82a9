"""Passes that only measure: the trainer's own routing replayed (R2), partial replay, routers wrong on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from r3 import controls
from r3.audit import find_alarms
from r3.errors import RoutingError
from r3.routing import RoutingTrace, Span, checksum
from r3.trainer.outcome import Recomputed
from r3.trainer.use import RouterFault, RoutingUse
from r3.trainer.worker import TrainerWorker
from r3.types import Batch, ModelSpec, Trajectory
from tests.gloo_pool import GlooPool
from tests.megatron.layouts import PP, layout_config, step_of_layout, worker_in
from tests.megatron.test_worker import faithful_batch, hf_logprobs, run_step
from tests.megatron.toys import joined_worker, make_advantages, make_batch, make_config, write_dense, write_model

pytestmark = pytest.mark.megatron
NATIVE, R3 = RoutingUse(force=False), RoutingUse(force=True)


@pytest.fixture(scope="module")
def worker(model_dir: Path) -> Iterator[TrainerWorker]:
    with joined_worker(make_config(metrics={"counterfactual_r2": True}), model_dir) as worker:
        yield worker


@pytest.fixture(scope="module")
def faithful(worker: TrainerWorker) -> Batch:
    """Records and log-probs as a perfect engine would give them, the log-probs up to a thousandth of a nat."""
    return faithful_batch(worker, noise=1e-3)


@pytest.fixture
def _no_model_stays() -> None:
    """The worker of this module stays from test to test."""


def measured(worker: TrainerWorker, uses: list[RoutingUse], batch: Batch) -> Recomputed:
    found = worker.measure(uses, batch)
    assert found is not None
    return found


def test_the_parts_belong_to_the_same_tokens(worker: TrainerWorker) -> None:
    batch = make_batch(worker.spec())
    found = measured(worker, [NATIVE, R3], batch)
    answers = batch.trajectories()
    assert found.lengths.tolist() == [answer.response_len for answer in answers]
    assert found.groups.tolist() == [answer.group for answer in answers]
    assert np.array_equal(found.rollout, np.concatenate([answer.logprobs for answer in answers]).astype(np.float64))
    native, replayed = found.passes
    assert native.logprobs.shape == replayed.logprobs.shape == found.rollout.shape
    assert np.abs(native.logprobs - replayed.logprobs).max() > 1e-3, "random records are not the own choice"
    assert (replayed.counts.replayed, native.counts.replayed) == (replayed.counts.required, 0)
    assert worker.weight_version == 0


def test_own_routing_replayed_is_the_native_pass(worker: TrainerWorker, model_dir: Path) -> None:
    batch = make_batch(worker.spec())
    share = worker._prepare([batch], None, mini_steps=1)
    native = worker._logprobs(share, RoutingUse(force=False, keep=True))
    again = worker._replay_own(share, native)
    assert again is not None
    assert np.abs(again.logprobs - native.logprobs).max() < 1e-5
    assert again.counts.mismatched_ids == again.counts.disagree_any == 0
    replayed = worker._logprobs(share, R3)
    assert np.abs(replayed.logprobs - native.logprobs).max() > 1e-3


@pytest.mark.parametrize("mode", ["r3", "none"])
def test_a_step_reports_r2_beside_the_others(model_dir: Path, mode: str) -> None:
    config = make_config(metrics={"counterfactual_r2": True}, replay={"mode": mode})
    worker = worker_in(config, model_dir)
    report = run_step(worker, make_batch(worker.spec()), counterfactual=True).metrics
    plain = "mismatch_native" if mode == "r3" else "mismatch"
    assert report["mismatch_r2/k3"] == pytest.approx(report[f"{plain}/k3"], rel=1e-4)
    assert report["mismatch_r2/abs_max"] == pytest.approx(report[f"{plain}/abs_max"], rel=1e-4)
    assert report["time/counterfactual_s"] > 0
    later = run_step(worker, make_batch(worker.spec()), step=2).metrics
    assert not any(key.startswith(("mismatch_r2", "mismatch_native", "time/counterfactual")) for key in later)


def test_replay_of_some_layers_forces_those_alone(worker: TrainerWorker) -> None:
    batch = make_batch(worker.spec())
    uses = [NATIVE, R3, *(RoutingUse(force=True, layers=layers) for layers in ((), (0, 1, 2, 3), (2, 3)))]
    native, full, nothing, everything, half = (one.logprobs for one in measured(worker, uses, batch).passes)
    assert np.array_equal(native, nothing)
    assert np.array_equal(full, everything)
    assert np.abs(half - native).max() > 1e-3
    assert np.abs(half - full).max() > 1e-3


def test_replay_of_sampled_rows_leaves_the_prompt_to_the_trainer(worker: TrainerWorker) -> None:
    batch = make_batch(worker.spec())
    sampled = measured(worker, [RoutingUse(force=True, sampled_rows=True)], batch).passes[0]
    # The same, said by records that begin with the first sampled token.
    cut = Batch.pack([_only_sampled(answer, worker.spec()) for answer in batch.trajectories()])
    expected = measured(worker, [R3], cut).passes[0]
    assert np.array_equal(sampled.logprobs, expected.logprobs)
    assert sampled.counts.replayed == expected.counts.replayed == sum(t.response_len - 1 for t in batch.trajectories())


def _only_sampled(answer: Trajectory, spec: ModelSpec) -> Trajectory:
    assert answer.routing is not None
    experts = np.ascontiguousarray(answer.routing.experts[answer.prompt_len :])
    experts.flags.writeable = False
    trace = RoutingTrace(
        experts=experts,
        layers=spec.moe_layers,
        num_experts=spec.num_experts,
        spans=(Span(answer.prompt_len, len(answer.tokens) - 1, 0),),
        engine="test",
        provenance="unknown",
        crc32=checksum(experts, answer.tokens),
    )
    return replace(answer, routing=trace)


def test_uniform_gates_weigh_the_recorded_experts_alike(worker: TrainerWorker) -> None:
    """The router's weights are zero for a moment: then its own gates are uniform, and the fault changes nothing."""
    batch = make_batch(worker.spec())
    uses = [R3, RoutingUse(force=True, fault=RouterFault(uniform_gates=True))]
    right, uniform = (one.logprobs for one in measured(worker, uses, batch).passes)
    assert np.abs(right - uniform).max() > 1e-3
    routers = [p for name, p in worker.policy.chunks[0].named_parameters() if name.endswith("router.weight")]
    before = [router.detach().clone() for router in routers]
    with torch.no_grad():
        for router in routers:
            router.zero_()
    try:
        plain, same = (one.logprobs for one in measured(worker, uses, batch).passes)
    finally:
        with torch.no_grad():
            for router, values in zip(routers, before, strict=True):
                router.copy_(values)
    assert len(routers) == 4
    assert np.abs(plain - same).max() < 1e-6
    assert np.abs(plain - uniform).max() < 1e-4, "the same experts at 1/k each"


def test_noise_moves_the_own_choice_and_not_replay(worker: TrainerWorker, faithful: Batch) -> None:
    faults = [None, RouterFault(noise=0.1), RouterFault(noise=1.0)]
    uses = [RoutingUse(force=force, fault=fault) for force in (False, True) for fault in faults]
    found = measured(worker, uses, faithful)
    native, replayed = found.passes[:3], found.passes[3:]
    sizes = [np.abs(one.logprobs - found.rollout).mean() for one in native]
    assert sizes[0] < sizes[1] < sizes[2]
    flips = [one.counts.disagree_any for one in native]
    assert flips[0] == 0 < flips[1] < flips[2]
    for one in replayed:
        # The last tokens, which no log-prob depends on, route otherwise, so the experts' products are cut otherwise.
        assert np.abs(one.logprobs - replayed[0].logprobs).max() < 1e-5


def test_wrong_records_raise_the_rules_of_the_audit(worker: TrainerWorker, faithful: Batch) -> None:
    audited = RoutingUse(force=True, audit=True)
    right = measured(worker, [audited], faithful)
    assert find_alarms(right.passes[0].overlaps, 0.7) == ()
    size = np.abs(right.passes[0].logprobs - right.rollout).mean()
    for change in (controls.shift, controls.neighbour, controls.reverse):
        wrong = measured(worker, [audited], Batch.pack(change(faithful.trajectories())))
        assert find_alarms(wrong.passes[0].overlaps, 0.7)
        assert np.abs(wrong.passes[0].logprobs - wrong.rollout).mean() > 10 * size


def test_a_missing_record_cannot_be_forced(worker: TrainerWorker) -> None:
    batch = make_batch(worker.spec(), routing=False)
    assert measured(worker, [NATIVE], batch).passes[0].overlaps == {}
    with pytest.raises(RoutingError, match="has no routing record"):
        worker.measure([NATIVE, R3], batch)


def test_a_dense_model_is_measured_and_trained_without_routing(tmp_path: Path) -> None:
    directory = write_dense(tmp_path / "dense")
    spec = ModelSpec.from_directory(directory)
    config = make_config(rollout={"dtype": "float32"}, routing={"capture": False}, replay={"mode": "none"})
    worker = worker_in(config, directory)
    batch = make_batch(spec, routing=False)
    found = measured(worker, [NATIVE], batch)
    first = batch.trajectory(0)
    expected = hf_logprobs(directory, first, config.rollout.temperature)
    assert np.abs(found.passes[0].logprobs[: len(expected)] - expected).max() < 1e-5
    result = worker.step(1, make_advantages(batch), True, batch)
    assert result is not None
    assert result.metrics["train/grad_norm"] > 0
    assert not any(key.startswith("router/") for key in result.metrics)


def test_a_stage_without_moe_layers_keeps_step(worker: TrainerWorker, gloo_pool: GlooPool, tmp_path: Path) -> None:
    """The first of two pipeline stages has no router: it runs every measuring pass all the same."""
    directory = write_model(tmp_path / "late", mlp_only_layers=[0, 1])
    batch = make_batch(ModelSpec.from_directory(directory))
    r2 = {"counterfactual_r2": True}
    alone = run_step(worker_in(make_config(metrics=r2), directory), batch, counterfactual=True).metrics
    found, _ = gloo_pool.run(step_of_layout, layout_config(PP, 2, metrics=r2), directory, batch)
    for key in ("mismatch/k3", "mismatch_native/k3", "mismatch_r2/k3"):
        assert found[key] == pytest.approx(alone[key], rel=1e-4), key
