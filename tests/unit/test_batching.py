"""Microbatches: every sample once, everything about row t at row t, every record checked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r3.errors import RoutingError
from r3.routing import RoutingTrace
from r3.trainer.batching import StepBatch, microbatch, require_records, share
from r3.types import Batch, ModelSpec, Record, Trajectory

SPEC = ModelSpec("qwen3_moe", 4, (1, 3), 16, 3, 8, 100)


def trajectory(group: int = 0, member: int = 0, prompt: int = 3, response: int = 4, seed: int = 0) -> Trajectory:
    rng = np.random.default_rng([seed, group, member])
    tokens = rng.integers(0, 100, prompt + response).astype(np.int32)
    wide = np.argsort(rng.random((len(tokens) - 1, 2, 16)), -1)[..., :3]
    trace = RoutingTrace.record(wide, tokens, layers=(1, 3), num_experts=16, weight_version=0, engine="test")
    logprobs = -rng.random(response).astype(np.float32)
    return Trajectory(group, member, tokens, prompt, logprobs, trace, 0.0, "stop", 0, SPEC.fingerprint)


def step_of(*trajectories: Trajectory) -> StepBatch:
    advantages = np.arange(1, len(trajectories) + 1, dtype=np.float32)
    return StepBatch.join([Batch.pack(trajectories)], advantages, SPEC)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    mini_steps=st.integers(1, 4),
    world=st.integers(1, 4),
    size=st.integers(1, 7),
    data=st.data(),
)
def test_every_sample_goes_to_one_place(
    sizes: list[int], mini_steps: int, world: int, size: int, data: st.DataObject
) -> None:
    samples = [
        trajectory(group, member, response=data.draw(st.integers(1, 9)))
        for group, members in enumerate(sizes)
        for member in range(members)
    ]
    plans = [
        share(samples, mini_steps=mini_steps, rank=rank, world=world, micro_batch_size=size) for rank in range(world)
    ]
    assert len({tuple(len(mini) for mini in plan) for plan in plans}) == 1, (
        "ranks run different numbers of microbatches"
    )
    everything = sorted(i for plan in plans for mini in plan for cut in mini for i in cut)
    assert everything == list(range(len(samples)))
    assert all(len(cut) <= size for plan in plans for mini in plan for cut in mini)
    for group in range(len(sizes)):
        where = {
            m for plan in plans for m, mini in enumerate(plan) for cut in mini for i in cut if samples[i].group == group
        }
        assert len(where) == 1, "a group is split over mini-steps"
    assert len(plans[0]) == min(mini_steps, len(sizes))


def test_microbatches_hold_similar_lengths() -> None:
    samples = [trajectory(group, response=length) for group, length in enumerate([9, 1, 8, 2, 9, 1])]
    ((first, second),) = share(samples, mini_steps=1, rank=0, world=1, micro_batch_size=3)
    assert {samples[i].response_len for i in first} == {8, 9}
    assert {samples[i].response_len for i in second} == {1, 2}


def test_rows_are_aligned() -> None:
    step = step_of(trajectory(0, response=2), trajectory(1, response=4))
    made = microbatch(step, [1, 0], SPEC)
    assert made.tokens.shape == (2, 7)
    for b, i in enumerate([1, 0]):
        sample, record = step.trajectories[i], step.records[i]
        last = len(sample.tokens) - 1
        assert record is not None
        for t, token in enumerate(sample.tokens):
            assert made.tokens[b, t] == token
            assert made.positions[b, t] == t
            if t == last:
                assert not made.recorded[b, t]
                assert made.targets[b, t] == -1
                continue
            assert made.labels[b, t] == sample.tokens[t + 1]
            assert made.recorded[b, t]
            np.testing.assert_array_equal(made.experts[b, t], record.blocks[0].experts[t])
            predicted = t + 1 - sample.prompt_len
            if predicted < 0:
                assert made.targets[b, t] == -1
            else:
                assert step.rollout_logprobs[made.targets[b, t]] == sample.logprobs[predicted]
                assert step.advantages[made.targets[b, t]] == i + 1
        assert not made.recorded[b, last + 1 :].any()
        assert (made.targets[b, last + 1 :] == -1).all()


def test_rows_are_counted_by_kind() -> None:
    step = step_of(trajectory(0, response=2), trajectory(1, response=4))
    rows = microbatch(step, [0, 1], SPEC).rows
    assert (rows.rows, rows.required, rows.missing, rows.pads) == (12, 10, 0, 2)


def test_a_gap_in_the_record_counts_as_missing() -> None:
    sample = trajectory(response=4)
    assert sample.routing is not None
    gap = sample.routing.clip(0, 2, sample.tokens).concatenate(sample.routing.clip(4, 6, sample.tokens), sample.tokens)
    made = microbatch(step_of(replace(sample, routing=gap)), [0], SPEC)
    assert made.recorded[0].tolist() == [True, True, False, False, True, True, False]
    np.testing.assert_array_equal(made.experts[0, [0, 1, 4, 5]], sample.routing.experts[[0, 1, 4, 5]])
    assert (made.rows.required, made.rows.missing) == (4, 2)


def test_an_empty_microbatch_is_one_pad() -> None:
    made = microbatch(step_of(trajectory()), [], SPEC)
    assert made.tokens.shape == (1, 1)
    assert not made.recorded.any()
    assert (made.targets == -1).all()
    assert (made.rows.rows, made.rows.pads) == (0, 1)


def broken_records(sample: Trajectory) -> dict[str, tuple[RoutingTrace, str]]:
    trace = sample.routing
    assert trace is not None
    repeated = trace.experts.copy()
    repeated[2, 1, 0] = repeated[2, 1, 1]
    shifted = np.roll(trace.experts, 1, axis=0)
    return {
        "short": (replace(trace, experts=trace.experts[:-1]), "do not add up to the 5"),
        "too few experts": (replace(trace, experts=trace.experts[..., :2]), "top-k"),
        "duplicate": (replace(trace, experts=repeated), "row 2, layer 3 repeats"),
        "other layers": (replace(trace, layers=(0, 3)), "layers, experts, top-k"),
        "reversed layers": (replace(trace, layers=(3, 1)), "layers, experts, top-k"),
        "shifted": (replace(trace, experts=shifted), "checksum"),
        "wrong checksum": (replace(trace, crc32=trace.crc32 ^ 1), "checksum"),
        "wide": (replace(trace, experts=trace.experts.astype(np.uint16)), "uint16"),
        "out of range": (
            replace(trace, experts=np.where(trace.experts == 0, 16, trace.experts).astype(np.uint8)),
            "outside",
        ),
    }


@pytest.mark.parametrize("kind", broken_records(trajectory()))
def test_broken_records_are_refused_by_name(kind: str) -> None:
    sample = trajectory(group=5, member=2)
    trace, message = broken_records(sample)[kind]
    step = replace(step_of(sample), records=(Record(trace.spans, (trace,)),))
    with pytest.raises(RoutingError, match=r"group 5, member 2") as error:
        microbatch(step, [0], SPEC)
    assert message in str(error.value)


def test_a_trajectory_without_record_is_refused_where_replay_needs_one() -> None:
    step = step_of(trajectory(0), replace(trajectory(1), routing=None))
    with pytest.raises(RoutingError, match=r"group 1, member 0.*no routing record"):
        require_records(step)
    assert microbatch(step, [0, 1], SPEC).rows.missing == 6


def test_another_models_trajectories_are_refused() -> None:
    with pytest.raises(RoutingError, match="sampled from model feed"):
        step_of(replace(trajectory(), fingerprint="feed"))


def test_advantages_must_fit_the_batches() -> None:
    with pytest.raises(RoutingError, match=r"\(2,\).*3 trajectories"):
        StepBatch.join([Batch.pack([trajectory(i) for i in range(3)])], np.zeros(2, np.float32), SPEC)
