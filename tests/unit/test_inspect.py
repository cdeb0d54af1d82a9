"""`python -m r3.inspect` as a user runs it: what it prints of a file and a run, and what it says is wrong."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from r3 import record
from r3.config import Config
from r3.inspect import main
from r3.portrait import LayerLoad, draw_loads, draw_rows, ranges, read_file
from r3.routing import RoutingTrace, Span
from r3.run import RunDirectory
from tests.command import ROOT, refused, run_module
from tests.unit.strategies import distinct_experts

TOKENS = np.arange(40, dtype=np.int32)
HEAVY = ("torch", "ray", "sglang", "megatron", "wandb", "transformers", "pydantic", "matplotlib", "rich")


def trace(seed: int = 0, version: int = 7, begin: int = 0, rows: int = 39) -> RoutingTrace:
    return RoutingTrace.record(
        distinct_experts(np.random.default_rng(seed), rows, 3, 4, 16), TOKENS,
        layers=(1, 2, 5), num_experts=16, weight_version=version, engine="sglang 0.5.23", begin=begin,
    )  # fmt: skip


def two_versions() -> RoutingTrace:
    """Rows 0 to 9 of version 7, none for 10 to 19, 20 to 38 of version 8."""
    return trace(rows=10).concatenate(trace(1, 8, 20, 19), TOKENS)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.r3"
    record.write_records(path, [(trace(), TOKENS), (two_versions(), TOKENS), (trace(2), None)])
    return path


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\n"
        f"atexit.register(lambda: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr))\n"
    )
    result = run_module("r3.inspect", "--help", path=(ROOT, tmp_path))
    assert result.returncode == 0
    assert result.stderr.splitlines()[-1] == "[]"
    assert "exit codes: 0 all is well, 2 usage, 3 something is broken" in result.stdout


def test_the_command_prints_what_a_file_holds(file: Path) -> None:
    result = run_module("r3.inspect", file)
    assert result.returncode == 0, result.stderr
    for line in (
        f"{file}: 3 records, {file.stat().st_size:,} bytes",
        "model       3 MoE layers (1-2, 5), top-4 of 16 experts, uint8",
        "engine      sglang 0.5.23",
        "provenance  unknown",
        "rows        107: 88 of version 7, 19 of version 8",
        "token ids   in 2 of 3 records",
        "record 1: 29 rows, 40 tokens, unknown",
        "  positions 0 to 39 |aaaaaaaaaa..........bbbbbbbbbbbbbbbbbbb.|",
        "    b = version 8: positions 20 to 38",
        "record 2: 39 rows, 40 tokens at least, unknown",
    ):
        assert line in result.stdout.splitlines(), line
    assert len([line for line in result.stdout.splitlines() if line.endswith("|") and "  0  |" in line]) == 3


def test_json_holds_the_same_facts(file: Path) -> None:
    result = run_module("r3.inspect", file, "--json")
    found = json.loads(result.stdout)
    assert (result.returncode, found["good"], len(found["records"])) == (0, True, 3)
    assert found["records"][1]["spans"] == [
        {"begin": 0, "end": 10, "weight_version": 7},
        {"begin": 20, "end": 39, "weight_version": 8},
    ]
    assert [layer["layer"] for layer in found["load"]] == [1, 2, 5]
    expected = sum(
        np.bincount(one.experts[:, 2].reshape(-1), minlength=16) for one in (trace(), two_versions(), trace(2))
    )
    assert found["load"][2]["chosen"] == expected.tolist()


def flip(data: bytearray, offset: int, begin: int) -> None:
    data[begin + offset] ^= 4


def shorten(data: bytearray, offset: int, begin: int) -> None:
    del data[-16:]


ROWS = 80 + 16 + 24 + 16 + 160
BREAKS = {
    "row": (flip, ROWS + 5, "record 1 at byte {at}, rows: checksum of the rows is"),
    "token": (flip, 80 + 16 + 24 + 16, "record 1 at byte {at}, tokens: checksum of rows and tokens is"),
    "engine": (flip, 80 + 16 + 24, "record 1 at byte {at}, header: checksum of the header is"),
    "expert count": (flip, 40, "record 1 at byte {at}, header: checksum of the header is"),
    "rows field": (flip, 24, "record 1 at byte {at}, layout:"),
    "version": (flip, 8, "record 1 at byte {at}, layout: format version 5"),
    "cut": (shorten, 0, "record 2 at byte {last}: its length is"),
    "length": (flip, 17, "record 1 at byte {at}: its length is"),
    "magic": (flip, 0, "record 1 at byte {at}: it begins with"),
}


@pytest.mark.parametrize(("change", "offset", "message"), BREAKS.values(), ids=BREAKS)
def test_a_broken_file_says_which_check_failed_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change, offset: int, message: str
) -> None:
    one = trace().to_bytes(TOKENS)
    data = bytearray(one + one + one)
    change(data, offset, len(one))
    path = tmp_path / "broken.r3"
    path.write_bytes(data)
    assert main([str(path)]) == 3
    said = capsys.readouterr().out
    assert "BROKEN " + message.format(at=len(one), last=2 * len(one)) in said
    assert "record 0: 39 rows" in said, "what is good is shown all the same"
    assert main([str(path), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["good"] is False


def test_the_row_of_a_record_that_was_written_wrong_is_named(tmp_path: Path) -> None:
    data = bytearray(trace().to_bytes(TOKENS))
    at = ROWS + 12 * 6 + 4
    data[at + 1] = data[at]
    rows = bytes(data[ROWS : ROWS + 39 * 12])
    tokens = bytes(data[136:296])
    struct.pack_into("<II", data, 64, zlib.crc32(tokens, zlib.crc32(rows)), zlib.crc32(rows))
    struct.pack_into("<I", data, 76, zlib.crc32(data[80:136], zlib.crc32(data[:76])))
    (tmp_path / "wrong.r3").write_bytes(data)
    result = run_module("r3.inspect", tmp_path / "wrong.r3")
    assert result.returncode == 3
    assert "BROKEN record 0 at byte 0, structure: row 6, layer 2 repeats an expert" in result.stdout
    assert "Traceback" not in result.stderr


def test_what_is_no_record_and_no_run_is_a_usage_error(tmp_path: Path) -> None:
    refused(run_module("r3.inspect", tmp_path / "none.r3"), 2, "does not exist")
    refused(run_module("r3.inspect", tmp_path), 2, "is no run directory")
    refused(run_module("r3.inspect"), 2, "required: FILE|RUN")


def test_a_text_file_is_a_broken_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("x" * 100)
    assert main([str(tmp_path / "notes.txt")]) == 3
    assert "it begins with b'xxxxxxxx', a routing record with" in capsys.readouterr().out
    (tmp_path / "empty.r3").touch()
    assert main([str(tmp_path / "empty.r3")]) == 3
    assert "is empty" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error(file: Path) -> None:
    """`python -m r3.inspect FILE | head`, with a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        [sys.executable, "-m", "r3.inspect", file], env={"PYTHONPATH": str(ROOT)}, stdout=writing,
        stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writing)
    assert (result.returncode, result.stderr) == (0, "")


def make_run(path: Path) -> RunDirectory:
    run = RunDirectory.create(path, Config())
    for step in (1, 2):
        run.log_metrics({"step": step, "mismatch/k3": step * 1e-4, "router/coverage": 1.0})
        run.log_event("checkpoint", step=step)
        record.write_records(run.routing(step), [(trace(step), TOKENS)])
    run.write_status("done", exit_code=0, step=2)
    return run


def test_a_run_directory_is_summed_up(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    result = run_module("r3.inspect", run.path)
    assert result.returncode == 0, result.stderr
    for line in (
        f"{run.path}: done (step 2, exit_code 0)",
        "steps       2; step 2: mismatch/k3 0.0002, router/coverage 1",
        "events      checkpoint 2",
        "routing     2 files, 78 rows",
        f"{run.routing(2)}: 1 record, {run.routing(2).stat().st_size} bytes",
    ):
        assert line in result.stdout.splitlines(), line


def test_a_run_that_still_writes_is_no_broken_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    with run.metrics.open("a") as file:
        file.write('{"step": 3, "mism')
    assert main([str(run.path)]) == 0
    assert "steps       2;" in capsys.readouterr().out


def test_a_broken_run_names_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    run.metrics.write_text("{}\n[1]\n{oops\n{}\n")
    data = bytearray(run.routing(1).read_bytes())
    data[ROWS] ^= 1
    run.routing(1).write_bytes(data)
    assert main([str(run.path)]) == 3
    said = capsys.readouterr().out
    assert f"BROKEN {run.metrics} line 2 is no JSON object" in said
    assert f"BROKEN {run.metrics} line 3 is not JSON" in said
    assert f"BROKEN {run.routing(1)}: record 0 at byte 0, rows:" in said


def test_load_is_drawn_by_expert_and_by_group_of_experts() -> None:
    few = LayerLoad(3, (0, 1, 5, 10))
    assert (few.dead, few.max_over_mean) == ((0,), 2.5)
    assert list(draw_loads([few]))[-1] == "     3      2.50     1  | .+@|"
    many = LayerLoad(0, tuple(range(256)))
    lines = list(draw_loads([many]))
    assert "4 experts a column" in lines[0]
    assert len(lines[-1].split("|")[1]) == 64
    assert lines[1].endswith("255")


def test_a_column_of_several_kinds_is_marked(tmp_path: Path) -> None:
    tokens = np.arange(641, dtype=np.int32)
    rows = distinct_experts(np.random.default_rng(0), 640, 3, 4, 16)
    long = RoutingTrace.record(rows[:635], tokens, layers=range(3), num_experts=16, weight_version=1, engine="e")
    long = long.concatenate(
        RoutingTrace.record(
            rows[635:], tokens, layers=range(3), num_experts=16, weight_version=2, engine="e", begin=635
        ),
        tokens,
    )
    record.write_records(tmp_path / "long.r3", [(long, tokens)])
    (facts,) = read_file(tmp_path / "long.r3").records
    assert facts.spans == (Span(0, 635, 1), Span(635, 640, 2))
    assert next(line for line in draw_rows(facts) if "positions 0" in line).endswith("|" + "a" * 63 + "+|")


def test_identical_rows_are_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = distinct_experts(np.random.default_rng(0), 39, 3, 4, 16)
    rows[10:30] = rows[10]
    one = RoutingTrace.record(rows, TOKENS, layers=range(3), num_experts=16, weight_version=1, engine="\x1b[31m")
    record.write_records(tmp_path / "run.r3", [(one, TOKENS)])
    assert main([str(tmp_path / "run.r3")]) == 0
    said = capsys.readouterr().out
    assert "rows 10 to 29 are identical in every layer; their token changes 19 times" in said
    assert "\x1b" not in said


def test_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([]) == ""
