"""The routing record keeps what it was given and refuses what cannot be true."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r3.errors import RoutingError
from r3.routing import (
    RoutingTrace,
    Span,
    check_constant_layers,
    check_spans,
    expert_dtype,
    merge_spans,
    narrow,
)
from tests.unit.strategies import distinct_experts, records


@pytest.mark.parametrize(
    ("num_experts", "dtype"),
    [(1, "uint8"), (255, "uint8"), (256, "uint8"), (257, "uint16"), (384, "uint16"), (65_536, "uint16")],
)
def test_dtype_follows_the_expert_count(num_experts, dtype):
    assert expert_dtype(num_experts) == np.dtype(dtype)


@pytest.mark.parametrize("num_experts", [0, -1, 65_537])
def test_expert_counts_without_a_dtype_are_refused(num_experts):
    with pytest.raises(RoutingError, match=str(num_experts)):
        expert_dtype(num_experts)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16"])
def test_narrow_keeps_every_legal_id(dtype):
    wide = np.arange(100, dtype=dtype).reshape(5, 5, 4)
    assert np.array_equal(narrow(wide, 256), wide)
    assert narrow(wide, 256).dtype == np.uint8


def test_narrow_uses_all_256_values():
    assert narrow(np.array([[[255, 0]]]), 256).tolist() == [[[255, 0]]]


@pytest.mark.parametrize("bad", [-1, 256, 300, 2**31])
def test_narrow_refuses_what_a_cast_would_wrap(bad):
    wide = np.zeros((3, 2, 4), dtype=np.int64)
    wide[1, 0, 2] = bad
    with pytest.raises(RoutingError, match=rf"{bad} at \[row, layer, slot\] \(1, 0, 2\)"):
        narrow(wide, 256)


def test_narrow_refuses_floats():
    with pytest.raises(RoutingError, match="float64"):
        narrow(np.zeros((1, 1, 1)), 4)


@given(records())
def test_a_record_holds_the_rows_that_were_recorded(made):
    trace, tokens, wide = made
    assert np.array_equal(trace.experts, wide)
    assert not trace.experts.flags.writeable
    assert trace.experts.flags.c_contiguous
    assert trace.positions().tolist() == list(range(len(tokens) - 1))
    trace.validate(len(tokens))
    trace.verify(tokens)


@given(records(), st.data())
def test_clip_and_concatenate_are_inverse(made, data):
    trace, tokens, _ = made
    cut = data.draw(st.integers(0, trace.rows))
    head, tail = trace.clip(0, cut, tokens), trace.clip(cut, len(tokens), tokens)
    joined = head.concatenate(tail, tokens)
    assert np.array_equal(joined.experts, trace.experts)
    assert joined.spans == trace.spans
    assert joined.crc32 == trace.crc32


@given(records(), st.data())
def test_clip_keeps_rows_at_their_positions(made, data):
    trace, tokens, wide = made
    begin = data.draw(st.integers(0, trace.rows))
    end = data.draw(st.integers(begin, trace.rows))
    part = trace.clip(begin, end, tokens)
    assert np.array_equal(part.experts, wide[begin:end])
    assert part.positions().tolist() == list(range(begin, end))
    part.verify(tokens)


@given(records(num_experts=16), st.data())
def test_any_changed_id_breaks_the_checksum(made, data):
    trace, tokens, _ = made
    at = tuple(data.draw(st.integers(0, size - 1)) for size in trace.experts.shape)
    changed = trace.experts.copy()
    changed[at] ^= data.draw(st.integers(1, 15))
    with pytest.raises(RoutingError, match="checksum"):
        _with_rows(trace, changed).verify(tokens)


@given(records(), st.data())
def test_routes_of_other_tokens_break_the_checksum(made, data):
    trace, tokens, _ = made
    other = tokens.copy()
    other[data.draw(st.integers(0, len(tokens) - 1))] += 1
    with pytest.raises(RoutingError, match="checksum"):
        trace.verify(other)


@given(records(num_experts=16))
def test_a_repeated_expert_is_refused_by_row_and_layer(made):
    trace, tokens, _ = made
    if trace.top_k == 1:
        return
    rows = trace.experts.copy()
    rows[-1, 0, 1] = rows[-1, 0, 0]
    with pytest.raises(RoutingError, match=rf"row {trace.rows - 1}, layer {trace.layers[0]} repeats"):
        _with_rows(trace, rows).validate(len(tokens))


def test_unwritten_rows_are_named_as_such():
    with pytest.raises(RoutingError, match="never written by the engine"):
        _record(np.zeros((3, 4, 4), dtype=np.int32))


@pytest.mark.parametrize("rows", [4, 5])
def test_more_rows_than_inputs_are_refused(rows):
    wide = distinct_experts(np.random.default_rng(0), rows, 4, 4, 16)
    with pytest.raises(RoutingError, match="at most 3 rows"):
        _record(wide)


@pytest.mark.parametrize("shape", [(3, 3, 4), (3, 16), (3, 4, 4, 1)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(RoutingError, match="4 MoE layers"):
        _record(np.zeros(shape, dtype=np.int32))


def test_a_record_in_the_wrong_width_is_refused():
    trace = _record(distinct_experts(np.random.default_rng(0), 3, 4, 4, 16))
    with pytest.raises(RoutingError, match="int64"):
        _with_rows(trace, trace.experts.astype(np.int64)).validate(4)


@pytest.mark.parametrize("k", [0, 17])
def test_a_top_k_that_no_model_of_so_many_experts_has_is_refused(k):
    trace = _record(distinct_experts(np.random.default_rng(0), 3, 4, 4, 16))
    with pytest.raises(RoutingError, match=f"top-k is {k} of 16 experts"):
        _with_rows(trace, np.zeros((3, 4, k), np.uint8)).validate(4)


def test_a_layer_that_never_changes_is_refused_over_a_batch():
    rows = distinct_experts(np.random.default_rng(0), 300, 4, 4, 16).astype(np.uint8)
    check_constant_layers([rows], range(4))
    rows[:, 2] = rows[0, 2]
    with pytest.raises(RoutingError, match="layer 2 routes all 300 rows"):
        check_constant_layers([rows], range(4))
    check_constant_layers([rows[:200]], range(4))


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([Span(0, 2, 1), Span(1, 3, 1)], "overlaps"),
        ([Span(2, 3, 1), Span(0, 2, 1)], "unsorted"),
        ([Span(1, 1, 1)], "empty"),
        ([Span(0, 2, 1)], "do not add up"),
        ([Span(0, 2, 1), Span(4, 5, 1)], "at most 4"),
    ],
)
def test_impossible_spans_are_refused(spans, message):
    with pytest.raises(RoutingError, match=message):
        check_spans(spans, 3, 5)


def test_a_gap_has_no_rows():
    wide = distinct_experts(np.random.default_rng(0), 5, 4, 4, 16)
    tokens = np.arange(9, dtype=np.int32)
    head = RoutingTrace.record(wide[:2], tokens, layers=range(4), num_experts=16, weight_version=1, engine="e")
    tail = RoutingTrace.record(wide[2:], tokens, layers=range(4), num_experts=16, weight_version=2, engine="e", begin=5)
    joined = head.concatenate(tail, tokens)
    assert joined.positions().tolist() == [0, 1, 5, 6, 7]
    assert joined.spans == (Span(0, 2, 1), Span(5, 8, 2))
    joined.validate(len(tokens))
    with pytest.raises(RoutingError, match="overlap"):
        tail.concatenate(head, tokens)


def test_neighbouring_spans_of_one_version_merge():
    assert merge_spans([Span(0, 2, 1), Span(2, 4, 1), Span(4, 5, 2)]) == (Span(0, 4, 1), Span(4, 5, 2))


def _record(wide):
    tokens = np.arange(4, dtype=np.int32)
    return RoutingTrace.record(wide, tokens, layers=range(4), num_experts=16, weight_version=0, engine="test")


def _with_rows(trace, rows):
    from dataclasses import replace

    return replace(trace, experts=rows)
