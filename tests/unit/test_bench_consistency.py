"""The table that `scripts/bench/consistency.py` makes of what `r3.mismatch` wrote."""

from __future__ import annotations

from typing import Any

from scripts.bench.consistency import facts_of, rows_of


def value(middle: float, low: float | None = None, high: float | None = None) -> dict[str, float | None]:
    return {"value": middle, "low": low, "high": high}


STUDY: dict[str, Any] = {
    "setting": {"engine_dtype": "bfloat16", "seed": 0},
    "rows": [
        {"name": "native", "tokens": 1000, "values": {"k3": value(4e-4, 3e-4, 5e-4), "disagree_token": value(0.4)}},
        {"name": "R3", "tokens": 1000, "values": {"k3": value(1e-4, 0.9e-4, 1.1e-4), "disagree_token": value(0.3)}},
    ],
    "factors": {"native k3 / R3 k3": value(4, 3.5, 4.5), "tokens beyond ratio 1.5, native / R3": None},
    "studies": {
        "moe": {"model": "builtin:m", "engine": "sglang 1.2", "trainer": {"torch": "2.0", "device": "cpu"}, "sums": {}}
    },
}


def test_rows_have_intervals_where_there_are_any() -> None:
    rows = {row["name"]: row for row in rows_of(STUDY)}
    assert list(rows) == [
        "native, tokens", "native, k3", "native, disagree_token",
        "R3, tokens", "R3, k3", "R3, disagree_token", "native k3 / R3 k3",
    ]  # fmt: skip
    assert rows["native, k3"] == {
        "name": "native, k3", "value": 4e-4, "unit": "nats", "baseline": "", "ratio": None, "ci95": [3e-4, 5e-4],
    }  # fmt: skip
    assert rows["R3, disagree_token"]["ci95"] == []
    assert rows["native k3 / R3 k3"]["ratio"] == 4
    assert rows["native k3 / R3 k3"]["baseline"] == "R3 k3"


def test_facts_are_those_of_the_host_that_measured() -> None:
    facts = facts_of(STUDY, "abc")
    assert facts["host"] == "cpu"
    assert facts["versions"] == {"torch": "2.0", "sglang": "1.2"}
    assert (facts["commit"], facts["models"], facts["engine_dtype"]) == ("abc", {"moe": "builtin:m"}, "bfloat16")
