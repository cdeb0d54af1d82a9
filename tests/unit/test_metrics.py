"""Every metric against hand-computed values and a slow, obvious reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r3 import metrics
from tests.expert_loads import expert_loads

logprobs = st.lists(st.tuples(st.floats(-8, -1e-6), st.floats(-8, -1e-6)), min_size=2, max_size=30)


@given(logprobs, st.data())
def test_mismatch_equals_the_definitions(pairs, data):
    train, rollout = zip(*pairs, strict=True)
    cut = data.draw(st.integers(1, len(pairs) - 1))
    got = metrics.mismatch(train, rollout, [cut, len(pairs) - cut])
    d = [a - b for a, b in pairs]
    n = len(d)
    sums = [max(-20, min(20, s)) for s in (sum(d[:cut]), sum(d[cut:]))]
    expected = {
        "k1": -sum(d) / n,
        "k2": sum(x * x for x in d) / 2 / n,
        "k3": sum(math.exp(x) - 1 - x for x in d) / n,
        "abs_mean": sum(map(abs, d)) / n,
        "abs_max": max(map(abs, d)),
        "extreme_1p2": sum(abs(x) > math.log(1.2) for x in d) / n,
        "extreme_1p5": sum(abs(x) > math.log(1.5) for x in d) / n,
        "extreme_2": sum(abs(x) > math.log(2) for x in d) / n,
        "extreme_5": sum(abs(x) > math.log(5) for x in d) / n,
        "mult_prob_error": sum(math.exp(abs(x)) for x in d) / n,
        "log_ppl_diff": (-sum(d[:cut]) / cut - sum(d[cut:]) / (n - cut)) / 2,
        "chi2_token": sum(math.exp(2 * x) for x in d) / n - 1,
        "ess_token": sum(map(math.exp, d)) ** 2 / (n * sum(math.exp(2 * x) for x in d)),
        "ess_sequence": sum(map(math.exp, sums)) ** 2 / (2 * sum(math.exp(2 * x) for x in sums)),
    }
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key
    assert set(expected) <= set(got)


def test_equal_log_probs_have_no_mismatch():
    got = metrics.mismatch([-1.0, -2.0], [-1.0, -2.0], [2])
    assert got["k3"] == got["k1"] == got["abs_max"] == got["extreme_1p2"] == got["chi2_token"] == 0
    assert got["pearson"] == pytest.approx(1)
    assert got["mult_prob_error"] == got["ess_token"] == got["ess_sequence"] == 1


def test_k3_resolves_differences_below_float32():
    # exp(d) - 1 - d in float32 is noise around 1e-9 here; the true value is d^2 / 2.
    d = 1e-6
    assert metrics.mismatch([-1.0 + d], [-1.0], [1])["k3"] == pytest.approx(d * d / 2, rel=1e-3)


def test_p99_is_the_quantile():
    d = np.arange(101) / 1000
    assert metrics.mismatch(d - 1, np.full(101, -1.0), [101])["abs_p99"] == pytest.approx(0.099)


def test_pearson_matches_numpy():
    a, b = np.random.default_rng(0).random((2, 50))
    assert metrics.pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])


def test_no_tokens_have_no_mismatch():
    assert metrics.mismatch([], [], []) == {}


def test_gain_is_absent_without_a_divisor():
    assert metrics.gain({"k3": 4.0}, {"k3": 2.0}) == {"gain_k3": 2.0}
    assert metrics.gain({"k3": 4.0}, {"k3": 0.0}) == {}
    assert metrics.gain({}, {"k3": 1.0}) == {}


def _counts(**change):
    base = dict(
        disagree=np.array([1, 3]), overlap=np.ones((2, 3, 2)), overlap_pairs=np.full((2, 3, 2), 10),
        windows=np.zeros((metrics.AUDIT_WINDOWS, 2)), loads=np.ones((2, 16), np.int64), compared=10, disagree_any=4,
        mismatched_ids=0, required=8, replayed=6, native=2, missing=2, pads=4,
    )  # fmt: skip
    return metrics.RouterCounts(**(base | change))


def test_disagreement_is_counted_per_pair_token_and_layer():
    assert metrics.disagreement(_counts(), "native", [0, 5]) == {
        "router/native_disagree_token_layer": 0.2,
        "router/native_disagree_token": 0.4,
        "router/native_disagree_layer/0": 0.1,
        "router/native_disagree_layer/5": 0.3,
    }


def test_replay_health_is_in_shares_of_rows():
    health = metrics.replay_health(_counts())
    assert health["router/coverage"] == 0.75
    assert health["router/native_rows"] == pytest.approx(2 / 12)
    assert health["router/pad_rows"] == pytest.approx(4 / 12)
    assert health["router/mismatched_ids"] == 0


def test_counts_of_two_ranks_add_up():
    both = _counts() + _counts(compared=5)
    assert both.compared == 15
    assert both.disagree.tolist() == [2, 6]
    assert (metrics.RouterCounts.zero(2, 16) + _counts()).replayed == 6


def test_load_imbalance_of_balanced_and_collapsed_routing():
    balanced = np.arange(16, dtype=np.uint8).reshape(4, 1, 4)
    assert metrics.load_imbalance(expert_loads(balanced, 16)).tolist() == [1]
    assert metrics.load_imbalance(expert_loads(np.zeros((4, 1, 4), np.uint8), 16)).tolist() == [16]


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 40))
def test_loads_equal_a_slow_count(seed, layers, rows):
    generator, experts, k = np.random.default_rng(seed), 6, 2
    ids = generator.random((rows, layers, experts)).argsort(2)[:, :, :k].astype(np.uint8)
    slow = [[sum(e in row[layer] for row in ids.tolist()) for e in range(experts)] for layer in range(layers)]
    loads = expert_loads(ids, experts)
    assert loads.tolist() == slow
    found = metrics.load_metrics(loads, k)
    assert found["router/load_max_over_mean"] == pytest.approx(max(max(row) for row in slow) / (rows * k / experts))
    assert found["router/dead_experts"] == pytest.approx(sum(row.count(0) for row in slow) / (layers * experts))
    assert found["router/dead_layers"] == sum(experts - row.count(0) <= k for row in slow)


def test_loads_of_no_record_are_no_metric():
    assert metrics.load_metrics(np.zeros((2, 4), np.int64), 2) == {}
    assert metrics.load_metrics(np.zeros((0, 0), np.int64), 0) == {}
    assert metrics.load_imbalance(np.zeros((1, 4), np.int64)).tolist() == [0]


def test_drift_is_half_the_sum_of_differences():
    loads, reference = (
        np.array([[3, 1, 0, 0], [5, 5, 0, 0], [1, 1, 1, 1]]),
        np.array([[1, 1, 1, 1], [10, 10, 0, 0], [0] * 4]),
    )
    # Layer 0: shares .75 .25 0 0 against .25 each; layer 1: the same shares; layer 2: nothing to compare with.
    assert metrics.load_drift(loads, reference).tolist() == [0.5, 0, 0]
    assert metrics.load_drift(np.array([[7, 0]]), np.array([[0, 1]])).tolist() == [1]


def test_bootstrap_interval_covers_the_mean():
    values = np.random.default_rng(0).normal(3, 1, 400)
    low, high = metrics.bootstrap_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(400), rel=0.15)
