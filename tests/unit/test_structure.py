"""Structural checks find what no live router can have produced, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r3.errors import RoutingError
from r3.routing import RoutingTrace
from r3.structure import (
    RUN_CHANGES,
    Run,
    check_constant_layers,
    check_live,
    check_runs,
    constant_layers,
    has_repeats,
    longest_run,
    repeated_ids,
    repeated_rows,
)
from tests.unit.strategies import distinct_experts


def rows_of(count: int, layers: int = 4, k: int = 4, experts: int = 16, seed: int = 0) -> np.ndarray:
    """Rows whose experts are a function of position."""
    return distinct_experts(np.random.default_rng(seed), count, layers, k, experts).astype(np.uint8)


@given(
    st.integers(0, 9), st.integers(1, 4), st.integers(1, 9), st.sampled_from([4, 16, 256]), st.integers(0, 2**32 - 1)
)
def test_repeats_are_found_exactly_where_there_are_any(rows, layers, k, ids, seed):
    """Random ids, which often repeat, against the definition."""
    for dtype in (np.uint8, np.uint16):
        experts = np.random.default_rng(seed).integers(0, ids, (rows, layers, k)).astype(dtype)
        expected = np.array([[len(set(pair)) < k for pair in row] for row in experts.tolist()], bool)
        expected = expected.reshape(rows, layers)
        assert np.array_equal(repeated_ids(experts), expected)
        assert has_repeats(experts) == expected.any()


@pytest.mark.parametrize("pairs", [1, 65_535, 65_536, 65_537, 140_000])
@pytest.mark.parametrize("k", [2, 6, 8])
def test_a_repeat_is_found_in_every_block_and_slot(pairs, k):
    """The check goes block by block over planes: no pair of slots and no edge of a block may be left out."""
    clean = np.tile(np.arange(k, dtype=np.uint8), (pairs, 1, 1))
    assert not has_repeats(clean)
    for at in {0, pairs // 2, pairs - 1}:
        for slot in range(1, k):
            wrong = clean.copy()
            wrong[at, 0, slot] = wrong[at, 0, slot - 1]
            assert has_repeats(wrong)
    wrong = clean.copy()
    wrong[-1, 0, k - 1] = 0
    assert has_repeats(wrong)


def test_neighbours_that_share_ids_are_no_repeat():
    """Planes are compared with an offset; slot a of one row must not meet slot b of another."""
    rows = np.stack([np.roll(np.arange(8, dtype=np.uint8), shift) for shift in range(8)])[:, None]
    assert not has_repeats(np.tile(rows, (5000, 1, 1)))


def test_constant_layers_are_told_from_live_ones():
    rows = rows_of(300)
    cut = [rows[:100], rows[100:101], rows[101:]]
    for pieces in ([rows], cut):
        assert not constant_layers(pieces).any()
    rows[:, 2] = rows[0, 2]
    for pieces in ([rows], cut):
        assert constant_layers(pieces).tolist() == [False, False, True, False]
    rows[17, 2] = rows[17, 2, ::-1]
    for pieces in ([rows], cut, cut[::-1]):
        assert not constant_layers(pieces).any()
    assert not constant_layers([rows[:0]]).any()
    rows[:, 1] = rows[0, 1]
    assert constant_layers([rows[:0], rows]).tolist() == [False, True, False, False]


def test_equal_neighbours_are_compared_in_all_layers():
    rows = rows_of(6)
    rows[3] = rows[2]
    rows[5, 0] = rows[4, 0]
    assert repeated_rows(rows).tolist() == [False, False, True, False, False]


def test_the_longest_run_counts_changes_of_token():
    rows, tokens = rows_of(40), np.arange(40)
    rows[5:15] = rows[5]
    rows[20:25] = rows[20]
    tokens[5:15] = 7
    assert longest_run(rows, tokens) == Run(20, 5, 4)
    assert longest_run(rows_of(40), tokens) == Run(0, 1, 0)
    assert longest_run(rows[:0], tokens[:0]) == Run(0, 0, 0)


def test_one_row_written_over_others_is_refused():
    """SGLang PR #36404: one row 67 times."""
    rows, tokens = rows_of(300), np.arange(300)
    rows[100:167] = rows[100]
    with pytest.raises(RoutingError, match=r"rows 100 to 166 are identical in all 4 layers .*changes 66 times"):
        check_runs(rows, tokens, 16)


def test_a_run_at_the_limit():
    rows, tokens = rows_of(100), np.arange(100)
    rows[10 : 10 + RUN_CHANGES] = rows[10]
    check_runs(rows, tokens, 16)
    rows[10 + RUN_CHANGES] = rows[10]
    with pytest.raises(RoutingError, match=f"changes {RUN_CHANGES} times"):
        check_runs(rows, tokens, 16)


def test_one_token_over_and_over_may_route_alike():
    """A prompt of blanks, or an answer that degenerated: attention over equal values gives the same value."""
    rows, tokens = rows_of(600), np.arange(600)
    rows[100:500], tokens[100:500] = rows[100], 5
    check_live(rows, range(4), 16, tokens)
    rows[:], tokens[:] = rows[0], 5
    check_live(rows, range(4), 16, tokens)


@pytest.mark.parametrize(("layers", "k", "experts"), [(1, 1, 4), (4, 4, 4), (2, 1, 16)])
def test_a_model_with_few_possible_rows_may_repeat_itself(layers, k, experts):
    rows = rows_of(40, layers, k, experts)
    rows[:] = rows[0]
    check_live(rows, range(layers), experts, np.arange(40))


def test_a_layer_that_does_not_react_to_tokens_is_refused():
    rows, tokens = rows_of(300), np.arange(300)
    rows[:, 2] = rows[0, 2]
    with pytest.raises(RoutingError, match="layer 12 routes all 300 rows"):
        check_live(rows, range(10, 14), 16, tokens)
    check_live(rows[:256], range(10, 14), 16, tokens[:256])
    check_live(rows, range(10, 14), 16, np.zeros(300, np.int64))
    with pytest.raises(RoutingError, match="layer 2"):
        check_constant_layers([rows], range(4))
    with pytest.raises(RoutingError, match="layer 2 routes all 300 rows"):
        check_constant_layers([rows[:0], rows], range(4))
    check_constant_layers([rows[:0]], range(4), rows=300)


def test_a_record_is_checked_when_it_is_made():
    rows, tokens = rows_of(300), np.arange(301, dtype=np.int32)
    rows[100:167] = rows[100]
    with pytest.raises(RoutingError, match="rows 100 to 166 are identical"):
        RoutingTrace.record(rows, tokens, layers=range(4), num_experts=16, weight_version=0, engine="test")
