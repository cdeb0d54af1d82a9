"""Microbatches: every sample once, everything about row t at row t, every record checked."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r3.errors import RoutingError
from r3.routing import RoutingTrace
from r3.trainer.batching import Form, StepBatch, microbatch, require_records, share
from r3.trainer.rows import RowClasses
from r3.types import Batch, ModelSpec, Record, Trajectory

SPEC = ModelSpec("qwen3_moe", 4, (1, 3), 16, 3, 8, 100)


def trajectory(
    group: int = 0, member: int = 0, prompt: int = 3, response: int = 4, seed: int = 0, spec: ModelSpec = SPEC
) -> Trajectory:
    rng = np.random.default_rng([seed, group, member])
    tokens = rng.integers(0, 100, prompt + response).astype(np.int32)
    wide = np.argsort(rng.random((len(tokens) - 1, len(spec.moe_layers), 16)), -1)[..., :3]
    trace = RoutingTrace.record(wide, tokens, layers=spec.moe_layers, num_experts=16, weight_version=0, engine="test")
    logprobs = -rng.random(response).astype(np.float32)
    return Trajectory(group, member, tokens, prompt, logprobs, trace, 0.0, "stop", 0, spec.fingerprint)


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


def by_hand(step: StepBatch, samples: Sequence[int], form: Form) -> dict[str, np.ndarray]:
    """Lay samples out token by token."""
    sizes = [len(step.trajectories[i].tokens) for i in samples]
    shape = (1, max(sum(sizes), 1)) if form.packed else (max(len(sizes), 1), max([*sizes, 1]))
    made = {name: np.zeros(shape, np.int64) for name in ("tokens", "labels", "recorded", "sampled", "filled")}
    made |= {name: np.full(shape, -1) for name in ("targets", "windows")}
    made |= {"pads": np.ones(shape, np.int64), "experts": np.zeros((*shape, len(SPEC.moe_layers), SPEC.top_k))}
    made["positions"] = np.zeros(shape, np.int64) if form.packed else np.tile(np.arange(shape[1]), (shape[0], 1))
    for b, i in enumerate(samples):
        sample, record, row = step.trajectories[i], step.records[i], 0
        for t, token in enumerate(sample.tokens):
            at = (0, sum(sizes[:b]) + t) if form.packed else (b, t)
            made["tokens"][at], made["positions"][at], made["pads"][at] = token, t, 0
            made["sampled"][at] = t >= sample.prompt_len
            if t + 1 < len(sample.tokens):
                made["labels"][at] = sample.tokens[t + 1]
                if t + 1 >= sample.prompt_len:
                    made["targets"][at] = step.offsets[i] + t + 1 - sample.prompt_len
            if record is not None and any(span.begin <= t < span.end for span in record.spans):
                made["recorded"][at] = 1
                made["windows"][at] = step.audit.places[step.audit.offsets[i] + row]
                made["experts"][at] = record.blocks[0].experts[row]
                row += 1
        before = at[0], at[1] - 1
        if len(sample.tokens) > 1 and made["recorded"][before]:
            made["filled"][at], made["experts"][at] = 1, made["experts"][before]
    donors = np.argwhere(made["recorded"])
    if len(donors):
        for turn, pad in enumerate(map(tuple, np.argwhere(made["pads"]))):
            made["filled"][pad], made["experts"][pad] = 1, made["experts"][tuple(donors[turn % len(donors)])]
    return made


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=6),
    kinds=st.lists(st.sampled_from(["whole", "gap", "none"]), min_size=6, max_size=6),
    packed=st.booleans(),
    data=st.data(),
)
def test_samples_laid_out_at_once_are_those_laid_out_token_by_token(
    sizes: list[tuple[int, int]], kinds: list[str], packed: bool, data: st.DataObject
) -> None:
    made = []
    for member, ((prompt, response), kind) in enumerate(zip(sizes, kinds, strict=False)):
        sample = trajectory(0, member, prompt, response)
        assert sample.routing is not None
        last = len(sample.tokens) - 1
        if kind == "gap" and last > 2:
            parts = (sample.routing.clip(begin, end, sample.tokens) for begin, end in ((0, 1), (2, last)))
            sample = replace(sample, routing=next(parts).concatenate(next(parts), sample.tokens))
        made.append(replace(sample, routing=None) if kind == "none" else sample)
    step = step_of(*made)
    samples = data.draw(st.permutations(range(len(made))))[: data.draw(st.integers(0, len(made)))]
    form = Form(packed=packed)
    # What memory held before must not show.
    found = microbatch(step, samples, SPEC, form, empty=lambda shape, dtype: np.full(shape, 255, dtype))
    expected = by_hand(step, samples, form)
    for name, values in expected.items():
        if name == "experts" and found.experts is None:
            assert all(record is None for record in step.records)
            continue
        np.testing.assert_array_equal(getattr(found, name), values, err_msg=name)
    rows, inputs = int((1 - expected["pads"]).sum()), int(expected["recorded"].sum())
    assert found.rows == RowClasses(rows, inputs, rows - len(samples) - inputs, int(expected["pads"].sum()))


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


DEEP = ModelSpec("qwen3_moe", 9, (1, 3, 4, 6, 7, 8), 16, 3, 8, 100)


def deep_step(size: int | None, layers: Collection[int] = DEEP.moe_layers) -> StepBatch:
    """Two samples in blocks of `size` layers, of which those with any of `layers` are at hand."""
    batch = Batch.pack([trajectory(group, response=3 + group, spec=DEEP) for group in range(2)], size)
    at_hand = tuple(block for block in batch.blocks if not set(layers).isdisjoint(block.layers))
    return StepBatch.join([replace(batch, blocks=at_hand)], None, DEEP)


@settings(deadline=None)
@given(st.integers(1, 7), st.sets(st.integers(0, 5)), st.booleans(), st.tuples(st.integers(0, 1), st.just(2)))
def test_a_stage_needs_only_the_blocks_with_its_layers(
    size: int, columns: set[int], packed: bool, context: tuple[int, int]
) -> None:
    form = Form(packed=packed, context=context, columns=tuple(sorted(columns)))
    layers = [DEEP.moe_layers[column] for column in columns]
    expected = microbatch(deep_step(None), [1, 0], DEEP, form)
    found = microbatch(deep_step(size, layers), [1, 0], DEEP, form)
    assert found.experts is not None
    assert found.experts.shape[2] == len(columns)
    np.testing.assert_array_equal(found.experts, expected.experts)
    np.testing.assert_array_equal(found.recorded, expected.recorded)
    assert found.rows == expected.rows


def test_a_block_that_did_not_come_is_named() -> None:
    with pytest.raises(RoutingError, match=r"group 0, member 0.*lack MoE layers \[4, 6, 7\]"):
        microbatch(deep_step(1, layers=(1, 3, 8)), [0], DEEP)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_every_block_that_is_used_is_verified(broken: int) -> None:
    step = deep_step(2)
    record = step.records[0]
    assert record is not None
    blocks = list(record.blocks)
    blocks[broken] = replace(blocks[broken], experts=np.roll(blocks[broken].experts, 1, axis=0))
    step = replace(step, records=(Record(record.spans, tuple(blocks)), step.records[1]))
    with pytest.raises(RoutingError, match=r"group 0, member 0.*checksum"):
        microbatch(step, [0], DEEP, Form(columns=(1, 2, 5)))
    others = tuple(column for column in range(6) if column // 2 != broken)
    assert microbatch(step, [0], DEEP, Form(columns=others)).recorded.any()


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
