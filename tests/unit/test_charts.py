"""What an offline W&B run holds for `wandb sync`: metric definitions, config, histograms, the table of worst tokens."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from r3 import charts
from r3.config import load_config
from r3.run import RunDirectory
from r3.tokens import EDGES, TokenReport
from r3.tracking import Tracker
from tests.made_up_run import LAYERS, make_row, make_tokens

wandb = pytest.importorskip("wandb")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunDirectory]:
    """Six logged steps, of which the first and the last looked at tokens."""
    config = load_config(None, ["tracking.wandb=offline", "trainer.lr=0.00125"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        run = RunDirectory.create(tmp_path_factory.mktemp("runs") / "run", config)
        tracker = Tracker(config, run)
        for step in range(1, 7):
            tracker.log(step, make_row(step), make_tokens(step) if step % 5 == 1 else None)
        tracker.close(0)
        # `finish` answers before W&B's own process wrote the last block of the file; its end is what waits for that.
        wandb.teardown()
        yield run


@pytest.fixture(scope="module")
def records(run: RunDirectory) -> list[Any]:
    """What `wandb sync` would send."""
    from wandb.proto import wandb_internal_pb2

    (file,) = run.path.glob("wandb/offline-run-*/*.wandb")
    return [wandb_internal_pb2.Record.FromString(data) for data in logged(file.read_bytes())]


def logged(data: bytes) -> Iterator[bytes]:
    """Yield the records of a `.wandb` file: LevelDB's log format behind a header of seven bytes."""
    block, head, first, last = 32_768, 7, (1, 2), (1, 4)
    parts, at = b"", head
    while at + head <= len(data):
        if block - at % block < head:
            at += block - at % block
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + head])
        parts = (b"" if kind in first else parts) + data[at + head : at + head + size]
        at += head + size
        if kind in last:
            yield parts


def history(records: list[Any]) -> list[dict[str, Any]]:
    """Return the logged steps; what is more than a number is a dictionary, of which a record has an item each."""
    rows = []
    for record in records:
        if not record.HasField("history"):
            continue
        row: dict[str, Any] = {}
        for item in record.history.item:
            key, *inner = item.nested_key or [item.key]
            value = json.loads(item.value_json)
            if inner:
                row.setdefault(key, {})[inner[0]] = value
            else:
                row[key] = value
        rows.append(row)
    return rows


def test_every_metric_has_the_step_as_axis_and_its_summaries(records: list[Any]) -> None:
    defined = {
        record.metric.glob_name or record.metric.name: record.metric for record in records if record.HasField("metric")
    }
    for group in charts.SUMMARIES:
        metric = defined[f"{group}/*"]
        assert metric.step_metric == "step"
        assert (metric.summary.min, metric.summary.max, metric.summary.last) == (True, True, True)


def test_the_config_is_the_resolved_one(records: list[Any]) -> None:
    updates = [update for record in records if record.HasField("run") for update in record.run.config.update]
    updates += [update for record in records if record.HasField("config") for update in record.config.update]
    found = {update.key: json.loads(update.value_json) for update in updates if update.key}
    assert found["trainer"]["lr"] == 0.00125
    assert found["replay"]["mode"] == "r3"


def test_steps_are_the_axis(records: list[Any]) -> None:
    rows = history(records)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[3]["mismatch/k3"] == make_row(4)["mismatch/k3"]


def test_the_heat_map_has_a_bin_for_every_layer_and_step(records: list[Any]) -> None:
    for row in history(records):
        found = row["layers/shadow_disagree"]
        assert found["_type"] == "histogram"
        assert found["values"] == [make_row(1)[f"router/shadow_disagree_layer/{layer}"] for layer in LAYERS]
        assert found["bins"] == [-0.5, 0.5, 1.5, 2.5, 3.5]


def test_histograms_of_the_difference_hold_the_counts(records: list[Any]) -> None:
    rows = history(records)
    assert [charts.DIFFERENCE in row for row in rows] == [True, False, False, False, False, True]
    assert rows[0][charts.DIFFERENCE]["values"] == list(make_tokens(1).difference.counts)
    assert rows[0][charts.DIFFERENCE]["bins"] == EDGES.tolist()
    assert charts.NATIVE_DIFFERENCE in rows[0]
    assert charts.NATIVE_DIFFERENCE not in rows[5], "the sixth step ran no pass without replay"


def test_the_table_of_worst_tokens_is_a_file_that_syncs(records: list[Any], run: RunDirectory) -> None:
    entry = history(records)[0][charts.WORST]
    assert entry["_type"] == "table-file"
    (folder,) = run.path.glob("wandb/offline-run-*/files")
    table = json.loads((folder / entry["path"]).read_text())
    assert table["columns"] == list(charts.COLUMNS)
    report = make_tokens(1)
    assert len(table["data"]) == len(report.worst)
    row = dict(zip(table["columns"], table["data"][0], strict=True))
    assert row["token"] == report.worst.tokens.texts[0]
    assert row["rollout log-prob"] == report.worst.tokens.rollout[0]
    assert row["trainer log-prob"] == report.worst.tokens.train[0]
    assert row["layers that disagree"] == ", ".join(map(str, report.worst.tokens.layers[0]))


def test_the_run_directory_holds_the_same_tokens(run: RunDirectory) -> None:
    rows = [json.loads(line) for line in Path(run.tokens).read_text().splitlines()]
    assert [TokenReport.from_row(row) for row in rows] == [make_tokens(1), make_tokens(6)]


def test_layers_are_in_order_whatever_the_keys(run: RunDirectory) -> None:
    values = {f"x/{layer}": float(layer) for layer in (10, 2, 1)}
    assert list(charts.layer_values(values, "x/")) == [1, 2, 10]
