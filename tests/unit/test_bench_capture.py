"""`scripts/bench/capture.py` without an engine: pairs and intervals, what a run that is killed leaves behind, and how
the scheduler is held back.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from r3.rollout.sglang_plugin.rows import RowStore
from scripts.bench import capture, capture_plugin
from scripts.bench.capture_engine import _release
from scripts.bench.capture_table import WAYS, Load, Run, interval, line_of, order_of, rows_of

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


def test_passes_are_counted_and_a_pair_that_differs_in_them_is_marked() -> None:
    gaps = [(0.01, 64)] * 60 + [(0.02, 64)] * 40
    alike = {way: Run(way, 1.0, prefills=3, decodes=30, gaps=gaps) for way in WAYS}
    slower = {**alike, "ours": Run("ours", 1.0, prefills=4, decodes=31, gaps=[(0.02, 64)] * 9)}
    rows = rows_of(LOAD, [alike, slower, alike])
    assert found(rows, "a load, ours, passes over prompts", "")["value"] == 3
    assert found(rows, "a load, off, passes of decoding", "")["value"] == 30
    assert found(rows, "a load, pairs in which every way made the same passes", "")["value"] == 2
    row = found(rows, "a load, ours, median between tokens", "off")
    assert (row["value"], row["ratio"], len(row["ci95"])) == (10, round(2 ** (1 / 3), 6), 2)
    assert line_of(LOAD, 1, alike, 4.0).endswith("ours 40 tokens/s, 3 + 30 passes, 4 s a round")
    assert "PASSES DIFFER: 3 + 30 passes (off, on, stock); 4 + 31 passes (ours)" in line_of(LOAD, 2, slower, 4.0)


def test_a_run_of_median_passes_has_no_part_of_what_one_run_met() -> None:
    def run(way: str, slow: int, each: float = 0.1) -> Run:
        parts = [each] * 10
        parts[slow] += 5
        return Run(way, sum(parts), parts=parts)

    rounds = [{"off": run("off", i), "ours": run("ours", 9 - i, 0.11)} for i in range(5)]
    name = "a load, ours, of median passes"
    row = found(rows_of(LOAD, rounds), name, "off")
    assert row["value"] == pytest.approx(40 / 1.1, rel=1e-6)
    assert row["ratio"] == pytest.approx(1 / 1.1, rel=1e-5)
    low, high = row["ci95"]
    assert low <= row["ratio"] < high
    assert found(rows_of(LOAD, rounds), "a load, ours", "off")["ratio"] == pytest.approx(6 / 6.1, rel=1e-5)
    # Fewer rounds, or ways with other passes, have none.
    rounds[1]["ours"].parts.pop()
    for fewer in (rounds[2:4], rounds):
        assert name not in {row["name"] for row in rows_of(LOAD, fewer)}


def test_the_file_has_a_line_for_every_run(tmp_path: Path) -> None:
    raw = {"a load": capture.raw_of([one_round(1, 2, 3, 4), one_round(5, 6, 7, 8)])}
    older = {"raw": {"a load": [{"off": [1.0, 2.0]}]}, "rows": []}
    capture.save(tmp_path / "found.json", [older], {"raw": raw, "rows": []})
    lines = (tmp_path / "found.json").read_text().splitlines()
    assert sum('"seconds"' in line for line in lines) == 8
    assert capture.earlier_runs(tmp_path / "found.json") == [older, {"raw": raw, "rows": []}]


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A scheduler with an empty queue; `plan` is what SGLang's hooked method returns for it."""
    module = SimpleNamespace(NextBatchPlan=lambda **fields: fields)
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.schedule_batch", module)
    ways, queue = capture_plugin.Ways(), SimpleNamespace(waiting_queue=[])
    return SimpleNamespace(
        ways=ways,
        queue=queue.waiting_queue,
        plan=lambda: ways.plan_prefill(lambda scheduler, batch: "planned", queue, "running"),
    )


def test_no_pass_is_planned_before_all_requests_of_a_run_wait(scheduler: Any) -> None:
    assert scheduler.plan() == "planned"
    scheduler.ways.hold(2)
    held = {"batch_to_run": None, "running_batch": "running"}
    assert scheduler.plan() == held
    scheduler.queue.append("first")
    assert scheduler.plan() == held
    assert scheduler.ways.released is None
    scheduler.queue.append("second")
    assert scheduler.plan() == "planned"
    assert scheduler.ways.released is not None
    # What comes later is not held, and the limit of a hold that has ended changes nothing.
    scheduler.queue.clear()
    scheduler.ways.hold(0)
    assert scheduler.plan() == "planned"
    assert scheduler.ways.released is not None


def test_a_hold_that_is_let_go_of_ends_the_benchmark(scheduler: Any) -> None:
    scheduler.ways.hold(2)
    scheduler.queue.append("first")
    scheduler.plan()
    scheduler.ways.hold(0)
    assert scheduler.plan() == "planned"
    with pytest.raises(RuntimeError, match="1 of 2 requests"):
        _release({"released": scheduler.ways.released, "queued": scheduler.ways.queued}, 2)


def test_sizes_are_read_from_what_the_plugin_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_plugin, "_rank", lambda: 0)
    monkeypatch.setattr(capture_plugin, "_has_cuda", lambda: False)
    ways = capture_plugin.Ways()
    ways.cache = SimpleNamespace(num_tokens=10, buffer=SimpleNamespace(numel=lambda: 60, element_size=lambda: 4))
    ways.ours = RowStore(10, 3, 2, 16)
    ways.facts(str(tmp_path / "facts"), trim=False)
    facts = json.loads((tmp_path / "facts.0").read_text())
    rows = capture.sizes(SimpleNamespace(facts=lambda: [facts]))
    assert found(rows, "slot rows in ordinary memory, ours, rank 0", "")["value"] == 60
    assert found(rows, "slot rows, stock, per million KV slots, rank 0", "")["value"] == round(24e6 / 2**30, 6)
    assert found(rows, "slot rows, ours, per million KV slots, rank 0", "")["value"] == round(6e6 / 2**30, 6)


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

    def run(self, load: Load, way: str, requests: dict[str, Any], trim: bool = False) -> Run:
        if len(self.order) == self._dies_at:
            raise Killed
        self.order.append((load.name, way))
        return Run(way, 1.0 + WAYS.index(way), pinned=(len(self.order), 7) if trim else (10**9, 10**9))


def options_of(*arguments: str) -> Any:
    return capture.parse(["--load", "one=1000", "--load", "batch=1000", *arguments])


def test_a_killed_run_keeps_every_pair_that_it_measured(tmp_path: Path) -> None:
    options = options_of("--pairs", "5", "--target", str(tmp_path / "found.json"))
    table: dict[str, Any] = {"environment": {"tp": 1}, "raw": {}, "rows": []}
    # Warm-up and five rounds of the first load; warm-up, a run that is not counted and two rounds of the second, two
    # ways of its third.
    bench = MadeUpBench(dies_at=6 * 4 + (1 + 3 * 4) + 2)
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
    pinned = {row["name"]: row["value"] for row in kept["rows"] if "pinned" in row["name"]}
    assert len(pinned) == 2 * len(WAYS) * 2
    assert pinned["1 request, 1024 in, 1024 out, off, pinned beside the slot rows, rank 0"] == 1
    assert pinned["1 request, 1024 in, 1024 out, off, pinned beside the slot rows, rank 1"] == 7


def test_a_load_ends_when_another_round_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(second) for second in range(1000))
    monkeypatch.setattr(capture.time, "perf_counter", lambda: next(clock))
    bench, noted = MadeUpBench(), []
    capture.race(bench, LOAD, until=9.0, pairs=99, note=lambda rounds: noted.append(len(rounds)))
    # A round is two readings of the clock apart, and one is read before each.
    assert len(bench.order) == 4 * max(noted)
    assert 2 <= max(noted) <= 4


def test_a_crowd_is_run_whole_once_before_it_counts() -> None:
    bench = MadeUpBench()
    rows = capture.warm_up(bench, LOAD)
    short = LOAD.short().name
    assert bench.order == [*((short, way) for way in order_of(0)), (LOAD.name, "ours")]
    assert {row["name"].split(",")[1].strip() for row in rows} == set(WAYS)
    alone = MadeUpBench()
    capture.warm_up(alone, Load("alone", (4,), (10,)))
    assert len(alone.order) == 4


def test_the_command_line_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        capture.parse(["--load", "huge=3"])
    assert "NAME=SECONDS" in capsys.readouterr().err
    plan = capture.plan_of("batch", 300, capture.loads_of(options_of())["batch"], options_of())
    assert "32768 tokens a run" in plan
    assert "5.7 pairs fit" in plan  # one run is not counted


@pytest.mark.parametrize(
    ("way", "own_copies", "in_twin"), [("off", 4, False), ("stock", 4, False), ("tee", 4, True), ("ours", 2, False)]
)
def test_each_way_copies_ids_as_its_name_says(way: str, own_copies: int, in_twin: bool) -> None:
    import torch

    ways, copies = capture_plugin.Ways(), []
    ways.way = way
    cache, ways.twin = (
        SimpleNamespace(name="routed_experts", buffer=torch.full((3, 2, 1), -1, dtype=torch.int32)) for _ in range(2)
    )

    def original(cache: Any, layer: int, ids: Any) -> None:
        copies.append(layer)
        capture_plugin._put(cache, layer, ids)

    for number in range(2):
        for layer in range(2):
            ids = torch.full((3, 1), 10 * number + layer, dtype=torch.int32)
            ways.capture(original, cache, layer_id=layer, topk_indices=ids)
    assert len(copies) == own_copies
    assert cache.buffer[:, :, 0].tolist() == [[10, 11]] * 3
    assert ways.twin.buffer[:, :, 0].tolist() == ([[10, 11]] if in_twin else [[-1, -1]]) * 3
    assert (ways._one_copy.layers == (0, 1)) == (way in ("tee", "ours"))
