"""Turns of one conversation are joined by position: what agrees is merged, what does not is refused by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from r3.errors import RoutingError
from r3.rollout.turns import merge_turns, next_start
from r3.routing import RoutingTrace, Span, checksum

TOKENS = np.arange(3, 15, dtype=np.int32)
LAYERS, EXPERTS, TOP_K = (0, 2), 16, 3


def rows(seed: int = 0) -> np.ndarray:
    """`[11, 2, 3]` distinct ids."""
    return np.random.default_rng(seed).random((len(TOKENS) - 1, len(LAYERS), EXPERTS)).argsort(axis=2)[:, :, :TOP_K]


def record(begin: int, end: int, version: int = 1, experts: np.ndarray | None = None) -> RoutingTrace:
    """Rows `[begin, end)` of a sequence of `end + 1` tokens."""
    whole = rows() if experts is None else experts
    return RoutingTrace.record(
        whole[begin:end], TOKENS[: end + 1], layers=LAYERS, num_experts=EXPERTS, weight_version=version, engine="test",
        begin=begin,
    )  # fmt: skip


def test_the_first_turn_ends_one_before_its_last_token() -> None:
    assert next_start(record(0, 6)) == 6
    assert next_start(record(0, 0)) == 0


@pytest.mark.parametrize("begin", [0, 2, 6])
def test_rows_that_both_turns_hold_are_merged(begin: int) -> None:
    whole = merge_turns(record(0, 6), record(begin, 11), TOKENS)
    np.testing.assert_array_equal(whole.experts, rows())
    assert whole.spans == (Span(0, 11, 1),)
    whole.verify(TOKENS)
    whole.validate(len(TOKENS))


def test_three_turns_one_after_the_other() -> None:
    two = merge_turns(record(0, 3), record(3, 7), TOKENS[:8])
    assert merge_turns(two, record(7, 11), TOKENS).crc32 == record(0, 11).crc32


def test_the_order_inside_a_row_carries_no_meaning() -> None:
    merge_turns(record(0, 6), record(2, 11, experts=rows()[:, :, ::-1]), TOKENS)


def test_under_new_weights_the_earlier_rows_stay() -> None:
    whole = merge_turns(record(0, 6, version=1), record(2, 11, version=2, experts=rows(1)), TOKENS)
    np.testing.assert_array_equal(whole.experts[:6], rows()[:6])
    np.testing.assert_array_equal(whole.experts[6:], rows(1)[6:])
    assert whole.spans == (Span(0, 6, 1), Span(6, 11, 2))


def test_rows_that_differ_under_one_version_are_refused() -> None:
    with pytest.raises(RoutingError, match=r"4 of 4 rows that two turns share disagree .* at position 2"):
        merge_turns(record(0, 6), record(2, 11, experts=rows(1)), TOKENS)


def test_a_gap_is_refused_with_the_start_to_ask_for() -> None:
    with pytest.raises(RoutingError, match=r"begins at position 8, .* ask for routing_start=6"):
        merge_turns(record(0, 6), record(8, 11), TOKENS)


def test_tokens_that_were_encoded_anew_are_refused() -> None:
    anew = TOKENS.copy()
    anew[4] += 1
    later = record(6, 11)
    with pytest.raises(RoutingError, match="do not belong together"):
        merge_turns(record(0, 6), later, anew)
    moved = replace(later, crc32=checksum(later.experts, anew))
    with pytest.raises(RoutingError, match="do not belong together"):
        merge_turns(record(0, 6), moved, anew)


def test_a_turn_that_adds_nothing_changes_nothing() -> None:
    earlier = record(0, 6)
    assert merge_turns(earlier, record(2, 6), TOKENS[:7]) is earlier
    assert merge_turns(earlier, record(6, 6), TOKENS[:7]) is earlier


def test_other_models_are_refused() -> None:
    other = RoutingTrace.record(
        rows()[6:, :1], TOKENS, layers=(0,), num_experts=EXPERTS, weight_version=1, engine="test", begin=6
    )
    with pytest.raises(RoutingError, match="different models"):
        merge_turns(record(0, 6), other, TOKENS)
