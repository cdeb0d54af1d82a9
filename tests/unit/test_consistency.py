"""The consistency table: sums against the definitions, intervals against known answers, and wrong records."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r3 import consistency, controls, metrics
from r3.consistency import Estimate, Row
from r3.errors import RoutingError
from tests.unit.strategies import trajectory

lengths_and_clusters = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=12).filter(
    lambda pairs: sum(length for length, _ in pairs) > 0
)


@given(lengths_and_clusters, st.integers(0, 2**32 - 1))
def test_sums_give_what_the_metrics_give(pairs, seed):
    lengths, clusters = (np.array(part) for part in zip(*pairs, strict=True))
    d = np.random.default_rng(seed).normal(0, 0.5, lengths.sum())
    sums = consistency.cluster_sums(d, lengths, clusters)
    found = consistency.mismatch_of(sums.sum(0))
    expected = metrics.mismatch(d - 9.0, np.full(len(d), -9.0), lengths)
    for key, value in found.items():
        assert value == pytest.approx(expected[key], rel=1e-9, abs=1e-12), key
    used = {c for c, length in zip(clusters, lengths, strict=True) if length}
    assert len(sums) == len(used)


def test_sums_by_hand():
    # Two answers of one prompt and one of another: ln 2, 0 | 0 || -ln 2.
    d = np.array([math.log(2), 0.0, 0.0, -math.log(2)])
    found = consistency.mismatch_of(consistency.cluster_sums(d, np.array([2, 1, 1]), np.array([7, 7, 3])).sum(0))
    assert found["k1"] == pytest.approx(0)
    assert found["k3"] == pytest.approx((2 - 1 - math.log(2) + 0.5 - 1 + math.log(2)) / 4)
    assert found["abs_mean"] == pytest.approx(math.log(2) / 2)
    assert found["extreme_1p5"] == 0.5
    assert found["extreme_2"] == 0, "the limit itself is not beyond it"
    assert found["ess_token"] == pytest.approx((2 + 1 + 1 + 0.5) ** 2 / (4 * (4 + 1 + 1 + 0.25)))
    assert found["ess_sequence"] == pytest.approx((2 + 1 + 0.5) ** 2 / (3 * (4 + 1 + 0.25)))


def test_disagreement_by_hand():
    both = consistency.pass_sums(10, 6, 4, 3) + consistency.pass_sums(10, 0, 0, 3)
    assert consistency.disagreement_of(both) == {"disagree_token_layer": 0.1, "disagree_token": 0.2}


def test_clusters_widen_the_interval_to_what_they_are_worth():
    # 200 prompts with ten equal answers each: ten times the tokens, not a bit more of information.
    draws = np.random.default_rng(0).normal(0, 1, 200)
    d, ones = np.repeat(draws, 10), np.ones(2000, np.int64)
    drawn = consistency.draw(
        {
            "prompt": consistency.cluster_sums(d, ones, np.repeat(np.arange(200), 10)),
            "answer": consistency.cluster_sums(d, ones, np.arange(2000)),
        }
    )
    by_prompt, by_answer = (consistency.estimates(drawn[key], consistency.mismatch_of)["k1"] for key in drawn)
    assert by_prompt.low is not None
    assert by_prompt.high is not None
    assert by_answer.low is not None
    assert by_answer.high is not None
    width, narrow = by_prompt.high - by_prompt.low, by_answer.high - by_answer.low
    assert width == pytest.approx(2 * 1.96 * draws.std() / math.sqrt(200), rel=0.15)
    assert width / narrow == pytest.approx(math.sqrt(10), rel=0.15)


def test_few_clusters_have_no_interval():
    sums = consistency.cluster_sums(np.ones(4), np.ones(4, np.int64), np.arange(4))
    assert consistency.estimates(consistency.draw({"": sums})[""], consistency.mismatch_of)["k1"] == Estimate(-1.0)


def test_a_draw_is_that_of_each_table_alone_and_of_any_chunk(monkeypatch):
    generator = np.random.default_rng(2)
    tables = {"a": generator.random((50, 3)), "b": generator.random((50, 2)), "c": generator.random((9, 2))}
    together = consistency.draw(tables)
    weights = np.random.default_rng(0).multinomial(50, np.full(50, 1 / 50), size=consistency.RESAMPLES)
    monkeypatch.setattr(consistency, "_HELD", 50 * 7)
    for key, sums in tables.items():
        assert consistency.draw({key: sums})[key].resamples == pytest.approx(together[key].resamples, rel=1e-12)
    assert together["b"].resamples == pytest.approx(weights @ tables["b"], rel=1e-12)


def test_a_paired_factor_is_sharper_than_an_unpaired_one():
    generator = np.random.default_rng(1)
    d = generator.normal(0, 1, 400) * generator.exponential(1, 400)
    ones, clusters = np.ones(400, np.int64), np.arange(400)
    sums = {name: consistency.cluster_sums(part, ones, clusters) for name, part in (("twice", 2 * d), ("once", d))}
    drawn, apart = consistency.draw(sums), consistency.draw(sums, seed=1)
    paired = consistency.factor(drawn["twice"], drawn["once"], "abs_mean")
    loose = consistency.factor(drawn["twice"], apart["once"], "abs_mean")
    assert paired is not None
    assert (paired.value, paired.low, paired.high) == pytest.approx((2, 2, 2))
    assert loose is not None
    assert loose.low is not None
    assert loose.high is not None
    assert loose.low < 1.9
    assert loose.high > 2.1


def test_a_factor_over_nothing_is_not_made_up():
    zero = consistency.cluster_sums(np.zeros(9), np.ones(9, np.int64), np.arange(9))
    some = consistency.cluster_sums(np.array([1.0] + 8 * [0.0]), np.ones(9, np.int64), np.arange(9))
    drawn, apart = consistency.draw({"some": some, "zero": zero}), consistency.draw({"some": some}, seed=1)
    assert consistency.factor(drawn["some"], drawn["zero"], "k3") is None
    found = consistency.factor(drawn["some"], apart["some"], "extreme_2")
    assert found is not None
    assert found.high == math.inf, "some resamples have no such token"


def test_the_table_shows_intervals_and_alarms():
    values = {"k3": Estimate(1e-4, 9e-5, 2e-4), "k1": Estimate(0.0), "disagree_token": Estimate(0.25)}
    head, rule, native, broken = consistency.markdown(
        [Row("native", "native", 10, 2, values), Row("x", "broken", 10, 2, {}, ("k3", "lag"))]
    )
    assert head.count("|") == rule.count("|") == native.count("|") == broken.count("|")
    assert "| 0 | 1.00e-04 [9.00e-05, 2.00e-04] |" in native
    assert native.endswith("| 25.00% |  |"), "no rule was applied"
    assert broken.endswith("| k3, lag |")


def _answers():
    generator = np.random.default_rng(0)
    return [trajectory(generator, i, 3, 4) for i in range(6)]


def _ids(answer):
    return answer.routing.experts


def test_wrong_records_are_valid_and_wrong_in_their_way():
    answers = _answers()
    for change in (controls.shift, controls.neighbour, controls.reverse):
        for before, after in zip(answers, change(answers), strict=True):
            after.routing.verify(after.tokens)
            assert np.array_equal(after.tokens, before.tokens)
            assert not np.array_equal(_ids(after), _ids(before))
    shifted, reversed_ = controls.shift(answers), controls.reverse(answers)
    assert np.array_equal(_ids(shifted[0])[1:], _ids(answers[0])[:-1])
    assert np.array_equal(_ids(reversed_[0])[:, 0], _ids(answers[0])[:, -1])
    # Two members a group: group 0 gets the routes of group 1, and so on, in a circle.
    for mine, other in ((0, 2), (3, 5), (4, 0)):
        assert np.array_equal(_ids(controls.neighbour(answers)[mine]), _ids(answers[other]))


def test_neighbours_need_two_prompts():
    with pytest.raises(RoutingError, match="at least two prompts"):
        controls.neighbour(_answers()[:2])
