"""What becomes of a sample whose record is missing or malformed, and rows that one write repeats."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from r3.config import RoutingConfig
from r3.errors import MissingRoutingError, RoutingError
from r3.rollout.checks import LONGEST_RUN, check_repeated_rows
from r3.rollout.engine import Generation
from r3.rollout.policies import fate
from r3.routing import RoutingTrace

TOKENS = np.arange(2, 102, dtype=np.int32)
ANSWER = Generation(TOKENS, 40, np.zeros(60, np.float32), None, "stop", 0)
MALFORMED, MISSING = RoutingError("a repeated id"), MissingRoutingError("nothing came back")


@pytest.mark.parametrize(
    ("on_error", "on_missing", "defect", "expected"),
    [
        ("fail", "fail", None, "keep"),
        ("drop_sample", "fail", MALFORMED, "drop"),
        ("native_sample", "fail", MALFORMED, "native"),
        ("fail", "drop_sample", MISSING, "drop"),
        ("fail", "native_sample", MISSING, "native"),
    ],
)
def test_the_two_policies_are_independent(on_error, on_missing, defect, expected) -> None:
    what, why = fate(ANSWER, defect, RoutingConfig(on_error=on_error, on_missing=on_missing))
    assert what == expected
    assert (str(defect) in why) if defect else why == ""


@pytest.mark.parametrize(
    ("defect", "policies", "key"),
    [
        (MALFORMED, {"on_missing": "native_sample"}, "routing.on_error"),
        (MISSING, {"on_error": "native_sample"}, "routing.on_missing"),
    ],
)
def test_the_default_is_to_fail_and_to_name_the_key(defect, policies, key) -> None:
    with pytest.raises(type(defect), match=f"{defect} .{key}: drop_sample .* native_sample"):
        fate(ANSWER, defect, RoutingConfig(**policies))


@pytest.mark.parametrize("defect", [None, MALFORMED, MISSING])
def test_an_aborted_answer_is_dropped_whatever_its_record_is(defect) -> None:
    what, why = fate(replace(ANSWER, finish="abort"), defect, RoutingConfig())
    assert what == "drop"
    assert "aborted by the engine" in why


def record(change=lambda rows: None, tokens: np.ndarray = TOKENS) -> RoutingTrace:
    rows = np.random.default_rng(0).random((len(tokens) - 1, 3, 16)).argsort(2)[:, :, :4]
    change(rows)
    return RoutingTrace.record(rows, tokens, layers=(0, 1, 2), num_experts=16, weight_version=0, engine="test")


def repeated(begin: int, rows: int):
    def change(experts: np.ndarray) -> None:
        experts[begin : begin + rows] = experts[begin]

    return change


@pytest.mark.parametrize("begin", [0, 10, 99 - LONGEST_RUN])
def test_a_row_that_was_written_many_times_is_found(begin: int) -> None:
    with pytest.raises(RoutingError, match=f"rows {begin} to {begin + LONGEST_RUN - 1} are the same in every layer"):
        check_repeated_rows(record(repeated(begin, LONGEST_RUN)), TOKENS)


def test_short_runs_equal_tokens_and_short_records_are_sound() -> None:
    check_repeated_rows(record(), TOKENS)
    check_repeated_rows(record(repeated(20, LONGEST_RUN - 1)), TOKENS)
    spaces = TOKENS.copy()
    spaces[20:80] = 7
    check_repeated_rows(record(repeated(20, 60), spaces), spaces)
    check_repeated_rows(record(tokens=TOKENS[:1]), TOKENS[:1])
