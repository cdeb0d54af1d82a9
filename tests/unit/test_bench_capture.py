"""The table of `scripts/bench/capture.py`: its pairs and intervals, and what a run that is killed leaves behind."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.bench import capture
from scripts.bench.capture_table import WAYS, Load, Run, interval, order_of, rows_of

LOAD = Load("a load", (4, 4), (10, 30))


def one_round(off: float, on: float, stock: float, ours: float) -> dict[str, Run]:
    return {way: Run(way, seconds) for way, seconds in zip(WAYS, (off, on, stock, ours), strict=True)}


def found(rows: list[dict[str, Any]], name: str, baseline: str) -> dict[str, Any]:
    (row,) = [row for row in rows if (row["name"], row["baseline"]) == (name, baseline)]
    return row


def test_every_way_follows_every_other_over_four_rounds() -> None:
    orders = [order_of(number) for number in range(4)]
    assert all(sorted(order) == sorted(WAYS) for order in orders)
    assert [sorted(places) for places in zip(*orders, strict=True)] == [sorted(WAYS)] * 4
    assert len({pair for order in orders for pair in pairwise(order)}) == 12
    assert order_of(1, ("on", "ours")) == ["on", "ours"]


def test_an_interval_is_students_over_logarithms() -> None:
    mean, (low, high) = interval([0.98, 1.0, 1.01, 0.99, 1.02])
    logs = np.log([0.98, 1.0, 1.01, 0.99, 1.02])
    half = 2.776 * logs.std(ddof=1) / np.sqrt(5)
    assert np.log([low, mean, high]) == pytest.approx([logs.mean() - half, logs.mean(), logs.mean() + half])
    assert interval([0.5]) == (pytest.approx(0.5), ())


def test_ratios_are_of_runs_of_the_same_round() -> None:
    # Every round is twice as slow as the one before; within a round `stock` takes 1.25 times as long as `off`.
    rows = rows_of(LOAD, [one_round(s, s, 1.25 * s, s) for s in (1.0, 2.0, 4.0, 8.0, 16.0)])
    row = found(rows, "a load, stock", "off")
    assert (row["value"], row["ratio"], row["ci95"]) == (8, 0.8, [0.8, 0.8])
    assert found(rows, "a load, ours", "stock")["ratio"] == 1.25
    assert found(rows, "a load, pairs", "")["value"] == 5


def test_an_incomplete_round_counts_where_both_ways_ran() -> None:
    last = {"ours": Run("ours", 4.0), "stock": Run("stock", 5.0)}
    rows = rows_of(LOAD, [one_round(1, 1, 1, 1), last])
    assert found(rows, "a load, ours", "off")["ci95"] == []
    assert len(found(rows, "a load, ours", "stock")["ci95"]) == 2
    assert found(rows, "a load, pairs", "")["value"] == 1


def test_what_the_client_spends_is_told_apart() -> None:
    run = Run("ours", 10.0, wait=0.1, decode=0.02, checks=0.5, pack=0.2, gaps=[(0.01, 64)] * 99 + [(0.5, 64)])
    assert run.ready == pytest.approx(10.82)
    assert run.p99 == 10
    rows = rows_of(LOAD, [{"ours": run, "stock": Run("stock", 10.0, decode=1.64)}])
    assert found(rows, "a load, ours, client decode without checks", "its generation")["ratio"] == 0.002
    assert found(rows, "a load, ours, client checks and stamps", "its generation")["value"] == 0.5
    assert found(rows, "a load, ours, prompt to packed batch", "stock")["ratio"] == pytest.approx(
        10.82 / 11.64, abs=1e-6
    )


class Killed(Exception):
    """What ends the benchmark in its third round."""


class MadeUpBench:
    """Runs take no time; the clock of the benchmark is made up as well."""

    ways = WAYS

    def __init__(self, dies_at: int = 1000) -> None:
        self.order: list[tuple[str, str]] = []
        self._dies_at = dies_at

    def requests(self, load: Load) -> dict[str, Any]:
        return {}

    def run(self, load: Load, way: str, requests: dict[str, Any]) -> Run:
        if len(self.order) == self._dies_at:
            raise Killed
        self.order.append((load.name, way))
        return Run(way, 1.0 + WAYS.index(way))


def options_of(*arguments: str) -> Any:
    return capture.parse(["--load", "one=1000", "--load", "batch=1000", *arguments])


def test_a_killed_run_keeps_every_pair_that_it_measured(tmp_path: Path) -> None:
    options = options_of("--pairs", "5", "--target", str(tmp_path / "found.json"))
    table: dict[str, Any] = {"environment": {"tp": 1}, "raw": {}, "rows": []}
    # Warm-up and five rounds of the first load, warm-up and two rounds of the second, two ways of its third.
    bench = MadeUpBench(dies_at=6 * 4 + 3 * 4 + 2)
    with pytest.raises(Killed):
        capture.measure(
            bench, capture.loads_of(options), options, table, lambda: capture.save(options.target, [], table)
        )
    (kept,) = json.loads(options.target.read_text())["runs"]
    pairs = {row["name"]: row["value"] for row in kept["rows"] if row["unit"] == "pairs"}
    assert list(pairs.values()) == [5, 2]
    assert [len(rounds) for rounds in kept["raw"].values()] == [5, 3]
    assert {row["baseline"] for row in kept["rows"] if row["name"].endswith("512 out, ours")} == {"off", "on", "stock"}
    assert capture.earlier_runs(options.target) == [kept]


def test_a_load_ends_when_another_round_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(second) for second in range(1000))
    monkeypatch.setattr(capture.time, "perf_counter", lambda: next(clock))
    bench, noted = MadeUpBench(), []
    capture.race(bench, LOAD, until=9.0, pairs=99, note=lambda rounds: noted.append(len(rounds)))
    # A round is two readings of the clock apart, and one is read before each.
    assert len(bench.order) == 4 + 4 * max(noted)
    assert 2 <= max(noted) <= 4


def test_the_command_line_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        capture.parse(["--load", "huge=3"])
    assert "NAME=SECONDS" in capsys.readouterr().err
    plan = capture.plan_of("batch", 300, capture.loads_of(options_of())["batch"], options_of())
    assert "32768 tokens a run" in plan
    assert "6.0 pairs fit" in plan
