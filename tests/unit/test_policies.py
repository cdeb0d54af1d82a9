"""What becomes of a sample whose record is missing or malformed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from r3.config import RoutingConfig
from r3.errors import MissingRoutingError, RoutingError
from r3.rollout.engine import Generation
from r3.rollout.policies import fate

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
