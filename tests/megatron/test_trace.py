"""What a step says of single tokens is what its passes did. Every layout: `test_layouts.py` compares `differs`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from r3.trainer.policy import Policy, RoutingUse
from tests.megatron.toys import (
    joined_worker,
    make_advantages,
    make_batch,
    make_config,
    own_routing,
    prepare,
)

pytestmark = pytest.mark.megatron


class Words:
    """Stands where a checkpoint has a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def expected_layers(policy: Policy, size: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Return what the trace found and, row by row, what it should find, each `[T, layers]`."""
    step, microbatches = prepare(policy, make_batch(policy.arch.spec), size)
    own = own_routing(policy, step, microbatches)
    # Half of the rows carry the own choice, so that both outcomes occur.
    draw = np.random.default_rng(3)
    microbatches = [
        replace(one, experts=np.where(draw.random(ids.shape[:3])[..., None] < 0.5, ids, one.experts).astype(np.uint8))
        for one, ids in zip(microbatches, own, strict=True)
    ]
    trace = policy.logprobs(microbatches, step, RoutingUse(force=False, trace=True)).trace
    assert trace is not None
    found = trace.of_tokens(np.arange(len(step.rollout_logprobs)))
    expected = np.zeros_like(found)
    for one, ids in zip(microbatches, own, strict=True):
        assert one.experts is not None
        for b, s in zip(*np.nonzero(one.targets >= 0), strict=True):
            for layer in range(found.shape[1]):
                expected[one.targets[b, s], layer] = set(ids[b, s, layer]) != set(one.experts[b, s, layer])
    return found, expected


def test_the_layers_of_a_token_are_those_of_the_row_behind_it(model_dir: Path) -> None:
    with joined_worker(make_config(trainer={"packed": False}), model_dir) as worker:
        found, expected = expected_layers(worker.policy)
    np.testing.assert_array_equal(found, expected)
    assert 0.2 < found.mean() < 0.8


def test_a_pass_that_is_not_asked_keeps_nothing(model_dir: Path) -> None:
    with joined_worker(make_config(), model_dir) as worker:
        step, microbatches = prepare(worker.policy, make_batch(worker.spec()), 5)
        assert worker.policy.logprobs(microbatches, step, RoutingUse(force=True)).trace is None


def test_a_step_reports_its_worst_tokens(model_dir: Path) -> None:
    config = make_config(metrics={"tokens_every": 2, "worst_tokens": 4})
    with joined_worker(config, model_dir) as worker:
        worker._tokens._tokenizer = Words()
        batch = make_batch(worker.spec())
        first = worker.step(1, make_advantages(batch), True, batch)
        second = worker.step(2, make_advantages(batch), False, batch)
    assert first is not None
    assert second is not None
    report = first.tokens
    assert report is not None
    assert second.tokens is None
    tokens = report.worst.tokens
    assert tokens.native is not None
    d = np.subtract(tokens.train, tokens.rollout)
    assert abs(d[0]) == pytest.approx(first.metrics["mismatch/abs_max"], rel=1e-4)
    assert (np.diff(np.abs(d)) <= 1e-6).all()
    by_place = {(t.group, t.member): t for t in batch.trajectories()}
    for k in range(4):
        one = by_place[report.worst.groups[k], report.worst.members[k]]
        position = report.worst.positions[k]
        assert tokens.ids[k] == one.tokens[one.prompt_len + position]
        assert tokens.rollout[k] == pytest.approx(one.logprobs[position], rel=1e-4)
        assert tokens.texts[k] == str(tokens.ids[k])
    assert report.total == sum(t.response_len for t in batch.trajectories())
    assert report.moe_layers == worker.spec().moe_layers
