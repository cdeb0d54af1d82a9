"""Packing loses nothing, copies nothing on the way out, and specs refuse to be mixed up."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r3.errors import ConfigError, RoutingError
from r3.types import Batch, ModelSpec, layer_blocks
from tests.unit.strategies import sharing, trajectories, trajectory

CONFIG = {
    "model_type": "qwen3_moe", "num_hidden_layers": 6, "mlp_only_layers": [1], "decoder_sparse_step": 1,
    "num_experts": 16, "num_experts_per_tok": 4, "hidden_size": 128, "vocab_size": 320,
}  # fmt: skip


@given(trajectories())
def test_every_trajectory_comes_back_as_it_was_packed(packed):
    batch = pickle.loads(pickle.dumps(Batch.pack(packed), protocol=5))
    assert len(batch) == len(packed)
    for before, after in zip(packed, batch.trajectories(), strict=True):
        assert np.array_equal(before.tokens, after.tokens)
        assert np.array_equal(before.logprobs, after.logprobs)
        assert (before.routing is None) == (after.routing is None)
        if before.routing is not None:
            assert np.array_equal(before.routing.experts, after.routing.experts)
            assert before.routing.spans == after.routing.spans
            after.routing.validate(len(after.tokens))
            after.routing.verify(after.tokens)
        for name in ("group", "member", "prompt_len", "reward", "finish", "weight_version", "fingerprint"):
            assert getattr(before, name) == getattr(after, name)


@given(trajectories())
def test_facts_follow_the_packing_order(packed):
    facts = Batch.pack(packed).facts()
    assert [(f.group, f.member, f.response_tokens) for f in facts] == [
        (t.group, t.member, t.response_len) for t in packed
    ]


def test_trajectories_are_views_into_the_batch():
    generator = np.random.default_rng(0)
    batch = Batch.pack([trajectory(generator, i, 3, 4) for i in range(3)])
    last = batch.trajectory(2)
    assert np.shares_memory(last.tokens, batch.tokens)
    assert np.shares_memory(last.logprobs, batch.logprobs)
    assert np.shares_memory(last.routing.experts, batch.blocks[0].rows[2])


@given(trajectories())
def test_the_object_store_copies_every_row_once_and_from_where_it_lay(packed):
    """Its copy is of the buffers that pickle hands it; what is pickled in band was copied before."""
    buffers = []
    pickled = pickle.dumps(Batch.pack(packed), protocol=5, buffer_callback=buffers.append)
    raws = [np.frombuffer(buffer, np.uint8) for buffer in buffers if memoryview(buffer).nbytes]
    records = [t.routing.experts for t in packed if t.routing is not None]
    handed = sum(raw.nbytes for raw in raws if any(np.shares_memory(raw, rows) for rows in records))
    assert handed == sum(rows.nbytes for rows in records) - shared_bytes(packed)
    assert not any(rows[0].tobytes() in pickled for rows in records if rows[0].size > 8)


@given(trajectories(), st.integers(1, 5))
def test_a_record_in_blocks_is_the_record(packed, size):
    batch = Batch.pack(packed, size)
    captured = [t for t in packed if t.routing is not None]
    assert [block.layers for block in batch.blocks] == (list(layer_blocks(range(4), size)) if captured else [])
    assert batch.routing_bytes == sum(t.routing.experts.nbytes for t in captured) - shared_bytes(packed)
    assert batch.stored.counts.tolist() == [0 if t.routing is None else t.routing.rows for t in packed]
    assert batch.stored.rows == sum(t.routing.rows for t in captured), "shared rows count in each record"
    for i, before in enumerate(packed):
        record, after = batch.record(i), batch.trajectory(i)
        assert (record is None) == (after.routing is None) == (before.routing is None)
        together = batch.records()[i]
        if record is None:
            assert together is None
            continue
        assert together.spans == record.spans
        for one, block in zip(together.blocks, record.blocks, strict=True):
            assert replace(one, experts=block.experts) == block
            assert np.array_equal(one.experts, block.experts)
            assert one.experts.flags.writeable == block.experts.flags.writeable
        for block, whole in zip(record.blocks, batch.blocks, strict=True):
            # Every block stands for itself: its rows and checksum need no other one.
            block.validate(len(before.tokens))
            block.verify(before.tokens)
            kept = [array for array in whole.stored if np.shares_memory(block.experts, array)]
            copied = batch.stored.shared[i, 1] and batch.stored.offsets[i] < batch.stored.offsets[i + 1]
            assert len(kept) == (not copied)
            assert all(array.flags.c_contiguous for array in whole.stored)
        assert after.routing.layers == before.routing.layers
        assert np.array_equal(after.routing.experts, before.routing.experts)
        assert (after.routing.crc32, after.routing.spans) == (before.routing.crc32, before.routing.spans)


def shared_bytes(packed) -> int:
    """Bytes of leading prompt rows that a member has in common with its group's first record, row by row."""
    total, firsts = 0, {}
    for one in packed:
        if one.routing is None:
            continue
        first = firsts.setdefault(one.group, one)
        if first is one:
            continue
        for a, b in zip(one.routing.experts[: one.prompt_len], first.routing.experts[: first.prompt_len], strict=False):
            if not np.array_equal(a, b):
                break
            total += a.nbytes
    return total


def test_the_prompt_rows_of_a_group_are_stored_once():
    generator = np.random.default_rng(0)
    first = trajectory(generator, 0, 6, 3)
    group = [first] + [replace(sharing(trajectory(generator, i, 6, 3), first, 6), group=0, member=i) for i in (1, 2, 3)]
    batch = Batch.pack(group, 2)
    # 6 prompt rows once, 2 more of each
    assert [[len(rows) for rows in block.stored] for block in batch.blocks] == [[8 + 3 * 2]] * 2
    assert [len(rows) for rows in Batch.pack(group).blocks[0].stored] == [8, 2, 2, 2]
    for i, before in enumerate(group):
        assert np.array_equal(batch.trajectory(i).routing.experts, before.routing.experts)


def test_a_damaged_shared_row_is_found_in_every_sample_that_has_it():
    generator = np.random.default_rng(0)
    first = trajectory(generator, 0, 6, 3)
    batch = Batch.pack([first, replace(sharing(trajectory(generator, 1, 6, 3), first, 6), group=0)])
    (block,) = batch.blocks
    first_rows = block.rows[0].copy()
    first_rows[2, 0, 0] ^= 1
    broken = replace(batch, blocks=(replace(block, rows=(first_rows, *block.rows[1:])),))
    for i in range(2):
        with pytest.raises(RoutingError, match="checksum"):
            broken.trajectory(i).routing.verify(broken.sample(i).tokens)


@given(trajectories(), st.sets(st.integers(0, 3)))
def test_some_blocks_are_the_record_of_their_layers(packed, kept):
    whole = Batch.pack(packed, 1)
    batch = replace(whole, blocks=tuple(block for block in whole.blocks if block.layers[0] in kept))
    assert batch.facts() == whole.facts()
    for i, before in enumerate(packed):
        record = batch.record(i)
        assert (record is None) == (before.routing is None)
        if record is not None:
            assert record.spans == before.routing.spans
            assert [block.layers for block in record.blocks] == [(layer,) for layer in sorted(kept)]
            for block in record.blocks:
                assert np.array_equal(block.experts[:, 0], before.routing.experts[:, block.layers[0]])


def test_a_wrong_record_is_refused_before_it_is_cut():
    right = trajectory(np.random.default_rng(0), 0, 3, 4)
    wrong = replace(right, routing=replace(right.routing, crc32=right.routing.crc32 ^ 1))
    with pytest.raises(RoutingError, match="checksum"):
        Batch.pack([wrong], 2)


def test_a_block_of_another_batch_is_refused():
    generator = np.random.default_rng(0)
    one, other = (Batch.pack([trajectory(generator, 0, 3, 4)], 2) for _ in range(2))
    mixed = replace(one, blocks=(one.blocks[0], other.blocks[1]))
    with pytest.raises(RoutingError, match="checksum"):
        mixed.trajectory(0)


def test_records_of_different_engines_are_not_packed_together():
    generator = np.random.default_rng(0)
    first, second = (trajectory(generator, i, 3, 4) for i in range(2))
    second = replace(second, routing=replace(second.routing, engine="other 2"))
    with pytest.raises(RoutingError, match="other 2"):
        Batch.pack([first, second])


def test_a_spec_lists_moe_layers_by_global_index(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"decoder_sparse_step": 2}))
    assert ModelSpec.from_directory(tmp_path).moe_layers == (3, 5)


def test_fingerprints_differ_where_models_differ():
    one = ModelSpec.from_hf_config(CONFIG)
    assert one.fingerprint == ModelSpec.from_hf_config(dict(CONFIG)).fingerprint
    for key in ("num_experts", "num_experts_per_tok", "num_hidden_layers", "vocab_size", "hidden_size"):
        assert ModelSpec.from_hf_config(CONFIG | {key: 8}).fingerprint != one.fingerprint


def test_different_models_are_told_apart_field_by_field():
    one, other = ModelSpec.from_hf_config(CONFIG), ModelSpec.from_hf_config(CONFIG | {"num_experts": 32})
    with pytest.raises(ConfigError, match="num_experts: engine 16, trainer 32"):
        one.require_same(other, "engine", "trainer")


def test_a_dense_model_is_a_control_without_routing():
    spec = ModelSpec.from_hf_config(CONFIG | {"model_type": "qwen3"})
    assert (spec.moe_layers, spec.num_experts, spec.top_k, spec.routing_bytes(10)) == ((), 0, 0, 0)
    with pytest.raises(ConfigError, match=r"model m is dense.*routing\.capture=false replay\.mode=none"):
        spec.require_routers("m")
    ModelSpec.from_hf_config(CONFIG).require_routers("m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"num_experts": None}, "num_experts is None"),
        ({"mlp_only_layers": [0, 1, 2, 3, 4, 5]}, "no MoE layer"),
    ],
)
def test_models_that_cannot_be_replayed_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelSpec.from_hf_config(CONFIG | change)


def test_a_missing_model_directory_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        ModelSpec.from_directory(tmp_path / "nothing")


def test_routing_bytes_are_one_per_id_up_to_256_experts():
    assert ModelSpec.from_hf_config(CONFIG).routing_bytes(10) == 10 * 5 * 4
    assert ModelSpec.from_hf_config(CONFIG | {"num_experts": 257}).routing_bytes(10) == 2 * 10 * 5 * 4
