"""The audit on a live trainer: a faithful record raises nothing, each kind of well-formed wrong one its alarm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from r3.audit import AuditError, find_alarms
from r3.canary import check_canary
from r3.errors import EngineError, RoutingError
from r3.trainer.batching import Form, StepBatch, microbatch
from r3.types import Batch
from tests.cases.payloads import Corruption, foreign_rows, layers_swapped, physical_ids, rows_shifted, rows_shuffled
from tests.megatron.test_worker import faithful_batch, rerouted, run_step, weights
from tests.megatron.toys import joined_worker, make_batch, make_config

pytestmark = pytest.mark.megatron
STRICT = {"routing": {"on_alarm": "fail"}}

WRONG: dict[str, tuple[Corruption, str]] = {
    "rows one later": (rows_shifted(1), "fits better shifted by one token"),
    "rows one earlier": (rows_shifted(-1), "fits better shifted by one token"),
    "rows of the sample shuffled": (rows_shuffled, "overlaps the trainer's own top-k by"),
    "rows of another sample": (foreign_rows, "overlaps the trainer's own top-k by"),
    "two layers swapped": (layers_swapped(1, 2), "layer 1 overlaps the trainer's own top-k by"),
    "all layers in reverse": (layers_swapped(0, 3, 1, 2), "overlaps the trainer's own top-k by"),
    "physical expert ids": (physical_ids, "overlaps the trainer's own top-k by"),
}


def corrupted(batch: Batch, worker, change: Corruption) -> Batch:
    samples = [sample.routing.experts for sample in batch.trajectories()]
    return rerouted(batch, worker.spec(), lambda ids, i: change(ids, samples[i - 1]))


@pytest.mark.parametrize(("change", "sentence"), WRONG.values(), ids=WRONG)
def test_a_wrong_record_stops_canary_and_step_before_it_is_trained_on(
    model_dir: Path, change: Corruption, sentence: str
) -> None:
    config = make_config(**STRICT, rollout={"dtype": "float32"})
    with joined_worker(config, model_dir) as worker:
        batch = faithful_batch(worker, noise=1e-3)
        right = worker.audit(batch)
        check_canary(config, right)
        wrong = corrupted(batch, worker, change)
        with pytest.raises(AuditError, match=rf"the start-up canary failed: .*{sentence}"):
            check_canary(config, worker.audit(wrong))

        before = weights(worker)
        with pytest.raises(AuditError, match=rf"step 7: .*{sentence}") as caught:
            run_step(worker, wrong, step=7)
        assert caught.value.alarms
        assert worker.weight_version == 0
        assert all(torch.equal(before[name], after) for name, after in weights(worker).items())
        assert run_step(worker, batch, step=8).alarms == ()


def test_alarms_of_a_step_can_only_warn(model_dir: Path) -> None:
    with joined_worker(make_config(), model_dir) as worker:
        batch = faithful_batch(worker, noise=1e-3)
        clean = run_step(worker, batch)
        wrong = run_step(worker, corrupted(batch, worker, rows_shifted(1)), step=2)
        assert (clean.alarms, clean.metrics["router/alarms"]) == ((), 0)
        assert wrong.metrics["router/alarms"] == len(wrong.alarms) > 0
        assert worker.weight_version == 2
        assert clean.metrics["router/lag0_overlap"] > 0.99
        assert {f"router/overlap_layer/{layer}" for layer in range(4)} <= clean.metrics.keys()
        assert clean.metrics["router/audited_rows"] == len(batch.tokens) - len(batch)


def test_a_stale_window_names_its_trajectory(model_dir: Path) -> None:
    with joined_worker(make_config(), model_dir) as worker:
        small = faithful_batch(worker, noise=0).trajectories()
        # 24 answers have 2 windows' rows only when repeated; groups tell them apart.
        many = [replace(t, group=100 * copy + t.group) for copy in range(3) for t in small]
        stale = corrupted(Batch.pack(many), worker, lambda ids, other: foreign_rows(ids, other)).trajectories()
        rows = np.cumsum([len(t.tokens) - 1 for t in many])
        mixed = Batch.pack(
            [new if end > rows[-1] - 300 else old for old, new, end in zip(many, stale, rows, strict=True)]
        )
        found = run_step(worker, mixed)
        windows = [alarm for alarm in found.alarms if alarm.rule == "window"]
        assert len(windows) == 1
        assert "trajectory (group 20" in windows[0].sentence
        assert windows[0].window > 0


def test_the_canary_refuses_other_log_probs_and_rows_that_were_not_replayed(model_dir: Path) -> None:
    config = make_config()
    with joined_worker(config, model_dir) as worker:
        found = worker.audit(faithful_batch(worker, noise=1.0))
        with pytest.raises(EngineError, match=r"mean .log-prob difference. under replay is 0\.\d+ nats, limit 0.5"):
            check_canary(config, found)
        with pytest.raises(RoutingError, match=r"router/coverage is 0\.5"):
            check_canary(config, found | {"router/coverage": 0.5})
        with pytest.raises(RoutingError, match="3 recorded ids were not used"):
            check_canary(config, found | {"router/mismatched_ids": 3.0})


def test_a_missing_record_fails_the_canary_under_every_policy(model_dir: Path) -> None:
    config = make_config(routing={"on_missing": "native_sample"})
    with joined_worker(config, model_dir) as worker:
        samples = faithful_batch(worker, noise=0).trajectories()
        samples[3] = replace(samples[3], routing=None)
        with pytest.raises(RoutingError, match=r"group 0, member 3\) has no routing record"):
            worker.audit(Batch.pack(samples))


@pytest.mark.parametrize("policy", ["on_error", "on_missing"])
def test_samples_without_a_record_are_trained_natively_beside_others(model_dir: Path, policy: str) -> None:
    config = make_config(routing={policy: "native_sample", "on_alarm": "fail"})
    with joined_worker(config, model_dir) as worker:
        samples = faithful_batch(worker, noise=0).trajectories()
        native = range(0, len(samples), 5)
        for i in native:
            samples[i] = replace(samples[i], routing=None)
        batch = Batch.pack(samples)
        report = run_step(worker, batch, counterfactual=True).metrics
        missing = sum(len(samples[i].tokens) - 1 for i in native)
        total = len(batch.tokens) / (1 - report["router/pad_rows"])
        assert report["router/coverage"] == 1, "every row that has a record was replayed"
        assert report["router/mismatched_ids"] == 0
        assert report["router/missing_rows"] == pytest.approx(missing / total)
        assert report["router/audited_rows"] == len(batch.tokens) - len(batch) - missing
        # The records are the model's own choice and the log-probs its own, so that nothing is off anywhere.
        assert report["mismatch/abs_max"] < 1e-5
        assert report["train/grad_norm"] > 0


def test_a_step_in_which_no_sample_has_a_record_is_native(model_dir: Path) -> None:
    config = make_config(routing={"on_missing": "native_sample", "on_alarm": "fail"})
    with joined_worker(config, model_dir) as worker:
        plain = make_batch(worker.spec(), routing=False)
        report = run_step(worker, plain).metrics
        assert report["router/coverage"] == 1
        assert report["router/missing_rows"] > 0.9 * (1 - report["router/pad_rows"])
        assert not {"router/lag0_overlap", "router/alarms"} & report.keys()


def test_the_audited_rows_do_not_depend_on_the_layout(model_dir: Path) -> None:
    with joined_worker(make_config(), model_dir) as worker:
        spec = worker.spec()
        step = StepBatch.join([make_batch(spec, groups=30, members=2)], None, spec)
    assert len(step.audit.windows) > 1
    found = []
    for form in (Form(), Form(packed=True), Form(packed=True, context=(0, 2)), Form(packed=True, context=(1, 2))):
        made = microbatch(step, range(60), spec, form)
        assert ((made.windows >= 0) == made.recorded).all()
        found.append(np.bincount(made.windows[made.recorded], minlength=len(step.audit.windows)))
    sizes = step.audit.windows[:, 1] - step.audit.windows[:, 0]
    np.testing.assert_array_equal([found[0], found[1], found[2] + found[3]], [sizes] * 3)


def test_the_rules_need_no_more_than_the_logged_numbers(model_dir: Path) -> None:
    with joined_worker(make_config(), model_dir) as worker:
        batch = faithful_batch(worker, noise=0)
        row = run_step(worker, corrupted(batch, worker, rows_shifted(1))).metrics
        assert find_alarms(dict(row), 0.6)
