"""The benchmark of the structural checks runs; what it says of time depends on the machine."""

from __future__ import annotations

import sys

import pytest

from scripts.bench import checks


def test_every_check_of_every_model_has_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["checks.py", "--tokens", "400", "--repeats", "1"])
    assert checks.main() in (0, 1), "within the limit, or over it"
    table = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines()[2:]]
    names = {name for _, name in table}
    assert {"range", "no expert twice", "constant layers", "identical rows", "**all**"} <= names
    assert len(table) == len(names) * len(checks.MODELS)
