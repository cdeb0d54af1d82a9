"""A training step as a whole: metrics, old log-probs, mini-steps, KL, skipped updates, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from r3 import metrics
from r3.errors import RoutingError
from r3.routing import checksum
from r3.trainer import feed, records
from r3.trainer.policy import RoutingUse
from r3.trainer.tally import Tally
from r3.trainer.worker import TrainerWorker
from r3.types import Batch, ModelSpec, StepResult, Trajectory
from tests.megatron.test_convert import unflatten
from tests.megatron.toys import (
    joined_worker,
    make_advantages,
    make_batch,
    make_config,
    make_trace,
    own_routing,
    prepare,
)

pytestmark = pytest.mark.megatron


def weights(worker: TrainerWorker) -> dict[str, torch.Tensor]:
    exported = worker.export()
    assert exported is not None
    return unflatten(exported)


def run_step(worker: TrainerWorker, batch: Batch, step: int = 1, counterfactual: bool = False) -> StepResult:
    result = worker.step(step, make_advantages(batch), counterfactual, batch)
    assert result is not None
    return result


def hf_logprobs(directory: Path, trajectory: Trajectory, temperature: float) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = torch.from_numpy(trajectory.tokens.astype(np.int64))
    with torch.no_grad():
        scaled = torch.log_softmax(model(tokens[None]).logits[0] / temperature, -1)
    return scaled[:-1].gather(1, tokens[1:, None])[trajectory.prompt_len - 1 :, 0].numpy()


def faithful_batch(worker: TrainerWorker, noise: float) -> Batch:
    """A batch as a perfect engine would record it: the trainer's own routing, its log-probs up to `noise` nats."""
    spec = worker.spec()
    batch = make_batch(spec, groups=6, members=4)
    step, microbatches = prepare(worker.policy, batch, size=1)
    own = own_routing(worker.policy, step, microbatches)
    logprobs = worker.policy.logprobs(microbatches, step, None).logprobs
    rng = np.random.default_rng(7)
    by_tokens = {m.tokens.tobytes(): ids for m, ids in zip(microbatches, own, strict=True)}
    made = []
    for i, trajectory in enumerate(step.trajectories):
        ids = by_tokens[trajectory.tokens.astype(np.int64)[None].tobytes()][0, :-1]
        exact = logprobs[step.offsets[i] : step.offsets[i + 1]]
        measured = (exact + noise * rng.standard_normal(len(exact))).astype(np.float32)
        made.append(replace(trajectory, logprobs=measured, routing=make_trace(spec, ids, trajectory.tokens)))
    return Batch.pack(made)


def rerouted(batch: Batch, spec: ModelSpec, change: Any, *, checked: bool = True) -> Batch:
    """The batch with every record changed by `change(ids, i)` and, unless it is not `checked`, valid again."""
    made = []
    samples = batch.trajectories()
    for i, sample in enumerate(samples):
        assert sample.routing is not None
        ids = change(sample.routing.experts, i)
        if checked:
            trace = make_trace(spec, ids, sample.tokens)
        else:
            trace = replace(sample.routing, experts=ids, crc32=checksum(ids, sample.tokens))
        made.append(replace(sample, routing=trace))
    return Batch.pack(made)


def test_step_replays_everything_and_moves_the_weights(model_dir: Path) -> None:
    with joined_worker(make_config(rollout={"dtype": "float32"}), model_dir) as worker:
        batch = make_batch(worker.spec())
        before = weights(worker)
        result = run_step(worker, batch, step=9)
        report = result.metrics
        assert (result.step, result.weight_version, worker.weight_version) == (9, 1, 1)
        assert report["router/coverage"] == 1
        assert report["router/mismatched_ids"] == 0
        assert report["router/missing_rows"] == 0
        assert 0 < report["router/shadow_disagree_token_layer"] <= report["router/shadow_disagree_token"] <= 1
        assert {f"router/shadow_disagree_layer/{layer}" for layer in range(4)} <= report.keys()
        assert (report["train/mini_steps"], report["train/skipped_steps"], report["train/clip_frac"]) == (1, 0, 0)
        assert report["train/grad_norm"] > 0
        assert report["train/lr"] == pytest.approx(1e-3)
        assert not any(key.startswith("mismatch_native") for key in report)
        # The loss of the first update is minus the token mean of the advantages: every ratio is 1.
        spread = np.repeat(make_advantages(batch), [t.response_len for t in batch.trajectories()])
        assert report["train/loss"] == pytest.approx(-spread.mean(), abs=1e-6)
        after = weights(worker)
        assert all(not torch.equal(before[name], after[name]) for name in before if "experts" not in name)
        exported = worker.export()
        assert exported is not None
        assert exported.version == 1
        assert run_step(worker, batch, step=10).metrics["rollout/staleness_max"] == 1


def test_a_pass_lays_out_a_microbatch_when_it_comes_to_it(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def noted(what: str, call: Any) -> Any:
        return lambda *args, **options: (done.append(what), call(*args, **options))[1]

    monkeypatch.setattr(feed, "microbatch", noted("laid out", feed.microbatch))
    with joined_worker(make_config(trainer={"micro_batch_size": 4}), model_dir) as worker:
        monkeypatch.setattr(worker.policy.replay, "run", noted("run", worker.policy.replay.run))
        run_step(worker, make_batch(worker.spec(), groups=4, members=3))
    assert done[:6] == ["laid out", "run"] * 3, "all the others would keep a GPU waiting for the first"


def test_a_pass_makes_the_last_checks_before_it_waits(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def noted(what: str, call: Any) -> Any:
        return lambda *args, **options: (done.append(what), call(*args, **options))[1]

    monkeypatch.setattr(records, "check_seals", noted("seals", records.check_seals))
    monkeypatch.setattr(Tally, "counts", noted("waits", Tally.counts))
    with joined_worker(make_config(trainer={"micro_batch_size": 4}), model_dir) as worker:
        monkeypatch.setattr(worker.policy.replay, "run", noted("run", worker.policy.replay.run))
        run_step(worker, make_batch(worker.spec(), groups=4, members=3))
    assert done[:7] == ["run", "seals", "run", "seals", "run", "seals", "waits"], "a device has work at every check"
    assert done.count("seals") == 3


def test_counterfactual_is_the_pass_without_replay(model_dir: Path) -> None:
    with joined_worker(make_config(), model_dir) as worker:
        batch = faithful_batch(worker, noise=1e-3)
        shifted = rerouted(batch, worker.spec(), lambda ids, _: np.roll(ids, 1, axis=0))
        report = run_step(worker, shifted, counterfactual=True).metrics
        assert report["mismatch_native/k3"] < 1e-5 < report["mismatch/k3"]
        assert report["mismatch/gain_k3"] == pytest.approx(report["mismatch_native/k3"] / report["mismatch/k3"])
        assert report["router/lag_margin"] < 0, "the record fits better one row later"
        assert report["time/counterfactual_s"] > 0


@pytest.mark.parametrize(
    "change",
    [
        lambda ids, i, samples: np.roll(ids, 1, axis=0),
        lambda ids, i, samples: np.resize(samples[i - 1].routing.experts, ids.shape),
        lambda ids, i, samples: ids[:, ::-1],
    ],
    ids=["shifted by one token", "a neighbour's routes", "reversed layers"],
)
def test_wrong_routes_raise_k3_more_than_a_hundredfold(model_dir: Path, change: Any) -> None:
    with joined_worker(make_config(), model_dir) as worker:
        batch = faithful_batch(worker, noise=1e-3)
        samples = batch.trajectories()
        right = worker.audit(batch)
        wrong = worker.audit(rerouted(batch, worker.spec(), lambda ids, i: change(ids, i, samples)))
        assert wrong["mismatch/k3"] > 100 * right["mismatch/k3"] > 0


def test_audit_proves_a_faithful_record(model_dir: Path) -> None:
    with joined_worker(make_config(), model_dir) as worker:
        found = worker.audit(faithful_batch(worker, noise=0))
        assert found["mismatch/abs_max"] < 1e-5
        assert found["mismatch_native/abs_max"] < 1e-5
        assert found["router/coverage"] == 1
        assert found["router/mismatched_ids"] == 0
        assert found["router/lag0_overlap"] == 1
        assert found["router/lag_margin"] > 0.1
        assert found["router/native_disagree_token"] == 0
        assert found["router/consulted_layers"] == 4
        assert worker.weight_version == 0


def test_mini_steps_are_updates_on_disjoint_groups(model_dir: Path) -> None:
    config = make_config(grpo={"mini_steps": 2}, rollout={"dtype": "float32"}, trainer={"lr": 1e-2, "packed": False})
    with joined_worker(config, model_dir) as worker:
        batch = make_batch(worker.spec(), groups=4)
        result = run_step(worker, batch)
        assert result.metrics["train/mini_steps"] == 2
        assert result.weight_version == 1
        both = weights(worker)
    # The same two halves by hand: old log-probs of the second half are those before the first update.
    with joined_worker(config, model_dir) as worker:
        policy, spec = worker.policy, worker.spec()
        from r3.trainer.batching import StepBatch, microbatch, share

        step = StepBatch.join([batch], make_advantages(batch), spec)
        plan = share(step.trajectories, mini_steps=2, rank=0, world=1, micro_batch_size=4)
        parts = [[microbatch(step, cut, spec) for cut in cuts] for cuts in plan]
        use = RoutingUse(force=True)
        old = policy.logprobs([m for part in parts for m in part], step, use).logprobs
        for part in parts:
            policy.update(part, step, old, None, use)
        again = weights(worker)
    assert all(torch.equal(both[name], again[name]) for name in both)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_are_those_of_hf_at_the_rollout_temperature(model_dir: Path, temperature: float) -> None:
    with joined_worker(make_config(rollout={"temperature": temperature}), model_dir) as worker:
        batch = make_batch(worker.spec(), groups=2, members=2)
        step, microbatches = prepare(worker.policy, batch)
        found = worker.policy.logprobs(microbatches, step, None).logprobs
        for i, trajectory in enumerate(step.trajectories):
            expected = hf_logprobs(model_dir, trajectory, temperature)
            np.testing.assert_allclose(found[step.offsets[i] : step.offsets[i + 1]], expected, atol=1e-5, rtol=0)


def test_kl_penalty_pulls_towards_the_initial_model(model_dir: Path) -> None:
    moved = {}
    for coefficient in (1e-6, 50.0):
        config = make_config(grpo={"kl_coef": coefficient}, trainer={"lr": 3e-3})
        with joined_worker(config, model_dir) as worker:
            batch = faithful_batch(worker, noise=0)
            found = [run_step(worker, batch, step).metrics["train/kl"] for step in range(1, 5)]
            assert found[0] < 1e-9, "policy and reference start as the same model"
            moved[coefficient] = found[-1]
    assert moved[1e-6] > 10 * moved[50.0] > 0


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(model_dir: Path) -> None:
    with joined_worker(make_config(rollout={"dtype": "float32"}), model_dir) as worker:
        batch = make_batch(worker.spec())
        before = weights(worker)
        advantages = make_advantages(batch)
        advantages[3] = np.inf
        result = worker.step(1, advantages, False, batch)
        assert result is not None
        assert result.metrics["train/skipped_steps"] == 1
        assert "train/grad_norm" not in result.metrics
        after = weights(worker)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert run_step(worker, batch, 2).metrics["train/skipped_steps"] == 0
        assert all(torch.isfinite(tensor).all() for tensor in weights(worker).values())


def test_warm_up_does_not_waste_the_first_update(model_dir: Path) -> None:
    with joined_worker(make_config(trainer={"lr_warmup_steps": 4, "lr_decay": "linear"}), model_dir, 8) as worker:
        batch = make_batch(worker.spec(), groups=2, members=2)
        rates = [run_step(worker, batch, step).metrics["train/lr"] for step in range(1, 9)]
        np.testing.assert_allclose(rates, np.array([0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0]) * 1e-3, atol=1e-9)


def test_without_replay_the_step_is_native(model_dir: Path) -> None:
    with joined_worker(make_config(replay={"mode": "none"}), model_dir) as worker:
        batch = make_batch(worker.spec())
        report = run_step(worker, batch, counterfactual=True).metrics
        plain = make_batch(worker.spec(), routing=False)
        assert "router/coverage" not in report
        assert report["router/native_disagree_token"] > 0.5
        assert not any(key.startswith(("mismatch_native", "router/shadow")) for key in report)
        step, microbatches = prepare(worker.policy, plain)
        native = metrics.mismatch(
            worker.policy.logprobs(microbatches, step, None).logprobs, step.rollout_logprobs, step.response_lengths
        )
        uncaptured = run_step(worker, plain, 2).metrics
        assert uncaptured["mismatch/k3"] == pytest.approx(native["k3"])
        assert not any(key.startswith("router/") for key in uncaptured)


def test_a_sample_without_record_stops_a_replayed_step(model_dir: Path) -> None:
    with joined_worker(make_config(), model_dir) as worker:
        samples = make_batch(worker.spec()).trajectories()
        samples[5] = replace(samples[5], routing=None)
        before = weights(worker)
        with pytest.raises(RoutingError, match="group 1, member 2"):
            run_step(worker, Batch.pack(samples))
        assert worker.weight_version == 0
        assert all(torch.equal(before[name], after) for name, after in weights(worker).items())


def test_a_record_of_other_tokens_stops_the_step(model_dir: Path) -> None:
    with joined_worker(make_config(), model_dir) as worker:
        batch = make_batch(worker.spec())
        tokens = batch.tokens.copy()
        tokens[20] += 1
        before = weights(worker)
        with pytest.raises(RoutingError, match="checksum"):
            run_step(worker, replace(batch, tokens=tokens))
        with pytest.raises(RoutingError, match="checksum"):
            worker.rehearse(make_advantages(batch), replace(batch, tokens=tokens))
        assert worker.weight_version == 0
        assert all(torch.equal(before[name], after) for name, after in weights(worker).items())


def repeating(batch: Batch, spec: ModelSpec, sample: int, layer: int = 1) -> Batch:
    """The batch with an expert twice in row 3 of a layer of one record, sealed so."""

    def twice(ids: np.ndarray, i: int) -> np.ndarray:
        ids = ids.copy()
        if i == sample:
            ids[3, layer, -1] = ids[3, layer, 0]
        return ids

    return rerouted(batch, spec, twice, checked=False)


REPEATED = r"group 1, member 2\): row 3, layer {} repeats an expert"


@pytest.mark.parametrize(("mode", "experts"), [("r3", "sequential"), ("r3", "grouped"), ("none", "sequential")])
def test_a_sealed_record_that_repeats_an_expert_stops_the_step(model_dir: Path, mode: str, experts: str) -> None:
    with joined_worker(make_config(replay={"mode": mode}, trainer={"experts": experts}), model_dir) as worker:
        batch = repeating(make_batch(worker.spec()), worker.spec(), sample=5)
        before = weights(worker)
        with pytest.raises(RoutingError, match=REPEATED.format(1)):
            run_step(worker, batch)
        with pytest.raises(RoutingError, match=REPEATED.format(1)):
            worker.audit(batch)
        with pytest.raises(RoutingError, match=REPEATED.format(1)):
            worker.measure([RoutingUse(force=False)], batch)
        with pytest.raises(RoutingError, match=REPEATED.format(1)):
            worker.rehearse(make_advantages(batch), batch)
        assert worker.weight_version == 0
        assert all(torch.equal(before[name], after) for name, after in weights(worker).items())


def test_several_batches_are_one_step(model_dir: Path) -> None:
    reports = []
    for split in (12, 5):
        with joined_worker(make_config(), model_dir) as worker:
            samples = make_batch(worker.spec()).trajectories()
            parts = [Batch.pack(part) for part in (samples[:split], samples[split:]) if part]
            result = worker.step(1, make_advantages(make_batch(worker.spec())), False, *parts)
            assert result is not None
            reports.append({k: v for k, v in result.metrics.items() if not k.endswith("_s") and "tokens_per" not in k})
    assert reports[0] == reports[1]


def test_bfloat16_trains_with_fp32_main_parameters(model_dir: Path) -> None:
    config = make_config(trainer={"dtype": "bfloat16", "lr": 1e-2}, rollout={"dtype": "bfloat16"})
    with joined_worker(config, model_dir) as worker:
        batch = make_batch(worker.spec())
        before = weights(worker)
        report = run_step(worker, batch).metrics
        assert report["router/coverage"] == 1
        assert report["train/skipped_steps"] == 0
        after = weights(worker)
        assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
        assert any(not torch.equal(before[name], after[name]) for name in before)


def test_saved_model_is_the_trained_one(model_dir: Path, tmp_path: Path) -> None:
    with joined_worker(make_config(rollout={"dtype": "float32"}), model_dir) as worker:
        batch = make_batch(worker.spec())
        run_step(worker, batch)
        worker.save_hf(str(tmp_path / "hf"))
        step, microbatches = prepare(worker.policy, batch, size=1)
        found = worker.policy.logprobs(microbatches, step, None).logprobs
    expected = np.concatenate([hf_logprobs(tmp_path / "hf", t, 1.0) for t in batch.trajectories()[:2]])
    np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-5, rtol=0)


def test_versions_and_spec(model_dir: Path) -> None:
    with joined_worker(make_config(), model_dir) as worker:
        assert worker.versions()["megatron-core"].startswith("0.")
        assert worker.spec().moe_layers == (0, 1, 2, 3)
