"""What a step keeps of single tokens: the right ones, the right numbers, a bounded amount."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from r3.tokens import (
    EDGES,
    SEQUENCES,
    TAIL,
    WINDOW,
    Difference,
    Pass,
    SequenceFacts,
    TokenReport,
    observe,
    observes_tokens,
)

LAYERS = (1, 3, 5)
Arrays = tuple[list[SequenceFacts], np.ndarray, np.ndarray, np.ndarray]


def decode(ids: Sequence[int]) -> str:
    return "".join(f"<{i}>" for i in ids)


def made_up(lengths: Sequence[int], seed: int = 0) -> Arrays:
    """Return sequences of 3 prompt tokens and `lengths`, both log-probs, and which layers disagree `[T, 3]`."""
    draw = np.random.default_rng(seed)
    facts = [
        SequenceFacts(i // 2, i % 2, float(i % 2), "stop", 3, draw.integers(0, 99, 3 + length))
        for i, length in enumerate(lengths)
    ]
    total = sum(lengths)
    rollout = -draw.random(total) * 3
    return facts, rollout, rollout + draw.standard_normal(total) * 0.1, draw.random((total, 3)) < 0.3


def report_of(arrays: Arrays, worst: int = 5, native: bool = False) -> TokenReport:
    facts, rollout, train, differs = arrays
    other = Pass(rollout + 0.5, lambda chosen: ~differs[chosen]) if native else None
    return observe(7, facts, rollout, Pass(train, lambda chosen: differs[chosen]), other, LAYERS, decode, worst=worst)


def test_the_worst_tokens_are_those_with_the_largest_difference() -> None:
    facts, rollout, train, differs = arrays = made_up([4, 9, 1, 30, 6])
    report = report_of(arrays)
    places = [(i, t) for i, one in enumerate(facts) for t in range(len(one.tokens) - 3)]
    expected = sorted(range(len(rollout)), key=lambda n: -abs(train[n] - rollout[n]))[:5]
    assert len(report.worst) == 5
    for k, n in enumerate(expected):
        i, t = places[n]
        one, columns = facts[i], report.worst.tokens
        assert (report.worst.groups[k], report.worst.members[k], report.worst.positions[k]) == (i // 2, i % 2, t)
        assert columns.ids[k] == one.tokens[3 + t]
        assert columns.texts[k] == decode([one.tokens[3 + t]])
        assert columns.rollout[k] == pytest.approx(rollout[n], rel=1e-5)
        assert columns.train[k] == pytest.approx(train[n], rel=1e-5)
        assert columns.layers[k] == tuple(layer for layer, flag in zip(LAYERS, differs[n], strict=True) if flag)
        assert report.worst.before[k] == decode(one.tokens[max(0, 3 + t - 12) : 3 + t])
        assert report.worst.after[k] == decode(one.tokens[4 + t : 10 + t])


def test_sequences_are_those_that_hold_them_worst_first() -> None:
    facts, _, train, differs = arrays = made_up([4, 9, 1, 30, 6])
    report = report_of(arrays)
    held = dict.fromkeys(zip(report.worst.groups, report.worst.members, strict=True))
    assert [(one.group, one.member) for one in report.sequences] == list(held)[:SEQUENCES]
    for one in report.sequences:
        i = 2 * one.group + one.member
        begin = sum(len(fact.tokens) - 3 for fact in facts[:i])
        assert (one.first, one.length, len(one.tokens.ids)) == (0, len(facts[i].tokens) - 3, one.length)
        assert one.tokens.ids == tuple(facts[i].tokens[3:])
        assert one.prompt == decode(facts[i].tokens[:3])
        np.testing.assert_allclose(one.tokens.train, train[begin : begin + one.length], rtol=1e-5)
        named = [tuple(np.array(LAYERS)[row]) for row in differs[begin : begin + one.length]]
        assert list(one.tokens.layers) == named


def test_a_long_sequence_is_cut_around_its_worst_token() -> None:
    facts, rollout, train, differs = made_up([50, 1000])
    train[50 + 700] = rollout[50 + 700] - 9
    (one, *_) = report_of((facts, rollout, train, differs)).sequences
    assert len(one.tokens.ids) == WINDOW
    assert one.first <= 700 < one.first + WINDOW
    assert one.tokens.train[700 - one.first] - one.tokens.rollout[700 - one.first] == pytest.approx(-9, abs=1e-4)
    train[50 + 998] = rollout[50 + 998] - 20
    (one, *_) = report_of((facts, rollout, train, differs)).sequences
    assert (one.first, len(one.tokens.ids)) == (1000 - WINDOW, WINDOW)


def test_a_line_stays_small_however_large_the_step() -> None:
    report = report_of(made_up([2000] * 20), worst=20, native=True)
    assert len(json.dumps(report.to_row())) < 100_000


def test_fewer_tokens_than_asked_for() -> None:
    assert len(report_of(made_up([2]), worst=20).worst) == 2


def test_the_routers_are_asked_once_for_all_chosen_tokens() -> None:
    """With several ranks the answer is a collective call: its number must not depend on the tokens."""
    facts, rollout, train, differs = made_up([4, 9, 30])
    asked: list[np.ndarray] = []

    def layers(chosen: np.ndarray) -> np.ndarray:
        asked.append(chosen)
        return differs[chosen]

    observe(1, facts, rollout, Pass(train, layers), Pass(train, layers), LAYERS, decode, worst=3)
    assert len(asked) == 2
    assert all((np.diff(chosen) > 0).all() for chosen in asked)


def test_counts_equal_a_token_by_token_count() -> None:
    d = np.array([-3.0, -1.0, -0.99, 0.0, 1e-4, 0.0125, 0.03, 0.5, 1.0, 40.0])
    found = Difference.of(d)
    counts = [0] * (len(EDGES) - 1)
    for value in np.clip(d, -1, 1):
        counts[min(int((value + 1) / 0.025 + 1e-9), 79)] += 1
    assert list(found.counts) == counts
    assert list(found.above) == [sum(abs(value) > limit for value in d) for limit in TAIL]


def test_a_line_reads_back() -> None:
    for native in (False, True):
        report = report_of(made_up([4, 9, 1]), native=native)
        assert TokenReport.from_row(json.loads(json.dumps(report.to_row()))) == report
        assert (report.native_difference is not None) == native


def test_the_native_pass_stands_beside() -> None:
    arrays = made_up([4, 9])
    report = report_of(arrays, native=True)
    tokens = report.worst.tokens
    assert tokens.native is not None
    assert tokens.native_layers is not None
    np.testing.assert_allclose(np.subtract(tokens.native, tokens.rollout), 0.5, atol=1e-4)
    for mine, other in zip(tokens.layers, tokens.native_layers, strict=True):
        assert sorted((*mine, *other)) == list(LAYERS)


def test_steps_are_counted_from_the_first() -> None:
    assert [step for step in range(1, 13) if observes_tokens(5, step)] == [1, 6, 11]
    assert not any(observes_tokens(0, step) for step in range(1, 13))
