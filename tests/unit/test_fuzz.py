"""The fuzzer itself: it passes today's decoders, and notices a decoder that raises or that believes a size field."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import ROOT

SCRIPT = ROOT / "scripts" / "fuzz_record.py"
PLANTED = """
import sys
sys.path.insert(0, {scripts!r})
import fuzz_record
fuzz_record.TARGETS["record"] = fuzz_record.Target([bytes(8)], lambda data: {call}, bytes)
sys.exit(fuzz_record.run(200, 0, ["record"], 64))
"""


def fuzz(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_nothing_but_a_routing_error_comes_out(tmp_path: Path) -> None:
    done = fuzz(SCRIPT, "--inputs", "4000", "--seed", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4,000 inputs, seed 1" in done.stdout
    for target in ("record", "sglang", "lightllm", "vllm", "stamps"):
        found = re.search(rf"{target} +accepted +[\d,]+, refused +[\d,]+ for (\d+) kinds", done.stdout)
        assert found, done.stdout
        assert int(found[1]) > 3, f"{target}: the inputs do not reach what lies behind the first checks"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("data[99]", "IndexError"),
        ("bytearray(2**30)", "MemoryError"),
        ("__import__('numpy').empty(2**60, 'u1')", "MemoryError"),
    ],
)
def test_a_decoder_that_is_wrong_is_noticed(tmp_path: Path, call: str, error: str) -> None:
    done = fuzz("-c", PLANTED.format(scripts=str(SCRIPT.parent), call=call), cwd=tmp_path)
    assert done.returncode == 1
    assert f"input 0 of target record raised {error}" in done.stderr.replace("_Array", "")
    assert [path.name for path in tmp_path.iterdir()] == ["crash-record-0"]


def test_a_finding_can_be_replayed(tmp_path: Path) -> None:
    (tmp_path / "crash-record-7").write_bytes(b"no record")
    done = fuzz(SCRIPT, "--replay", "crash-record-7", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "refused\n")
