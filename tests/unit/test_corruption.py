"""Random corruptions of a valid record: each stage finds what it promises, and a clean record passes all of them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.command import ROOT
from tests.corruption import CHANGES, changed, found_by_meaning, found_by_structure, found_on_wire, refused
from tests.synthetic_router import Router, Sample, Shape

SHAPES = (Shape(4, 4, 16), Shape(6, 8, 64), Shape(6, 8, 300))
LENGTHS = (80, 300, 600)
SAMPLES: list[list[Sample]] = []
# What a stage must find every single time; docs/checks.md has the rates of the rest.
BY_STRUCTURE = (
    "duplicated id", "zeros (rows never written)", "-1 in two slots", "last rows missing",
    "one row over 67 others or more",
)  # fmt: skip
BY_MEANING = (
    "all rows one token early or late", "rows of another sequence, all", "rows shuffled",
    "physical ids (permutation)",
)  # fmt: skip


def samples() -> list[list[Sample]]:
    """Two sequences of every length for each model, made once."""
    if not SAMPLES:
        for shape in SHAPES:
            router = Router(shape, seed=shape.experts)
            SAMPLES.append([router.sample(length) for length in LENGTHS for _ in range(2)])
    return SAMPLES


cases = st.tuples(st.integers(0, len(SHAPES) - 1), st.integers(0, 2 * len(LENGTHS) - 1), st.integers(0, 2**32 - 1))


def wrong_rows(name: str, case: tuple[int, int, int]) -> tuple[Sample, np.ndarray]:
    shape, i, seed = case
    pool = samples()[shape]
    return pool[i], changed(name, pool[i], pool[i ^ 1], np.random.default_rng(seed))


def differs(sample: Sample, rows: np.ndarray) -> bool:
    return rows.shape != sample.trace.experts.shape or bool((rows != sample.trace.experts).any())


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "none"])
@settings(max_examples=30)
@given(case=cases)
def test_whatever_changes_after_a_record_was_sealed_is_found(name: str, case: tuple[int, int, int]) -> None:
    sample, rows = wrong_rows(name, case)
    if differs(sample, rows):
        assert found_on_wire(sample, rows)


@pytest.mark.parametrize("name", BY_STRUCTURE)
@settings(max_examples=30)
@given(case=cases)
def test_structure_finds_what_no_router_can_have_made(name: str, case: tuple[int, int, int]) -> None:
    assert found_by_structure(*wrong_rows(name, case))


@pytest.mark.parametrize("name", BY_MEANING)
@settings(max_examples=30)
@given(case=cases)
def test_meaning_finds_well_formed_rows_of_another_place(name: str, case: tuple[int, int, int]) -> None:
    assert found_by_meaning(*wrong_rows(name, case))


@settings(max_examples=30)
@given(case=cases)
def test_structure_alone_cannot_see_a_well_formed_row_of_another_place(case: tuple[int, int, int]) -> None:
    """The reason for the semantic checks; were it to fail, docs/checks.md would promise too little."""
    for name in BY_MEANING:
        assert not found_by_structure(*wrong_rows(name, case))


def test_a_clean_record_passes_every_stage() -> None:
    for shape in range(len(SHAPES)):
        for i in range(len(samples()[shape])):
            sample, rows = wrong_rows("none", (shape, i, 0))
            assert not found_on_wire(sample, rows)
            assert not found_by_structure(sample, rows)
            assert not found_by_meaning(sample, rows)


@settings(max_examples=60)
@given(case=cases, cut=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_damaged_bytes_of_any_part_are_found(case: tuple[int, int, int], cut: float, bit: int) -> None:
    sample = samples()[case[0]][case[1]]
    data = sample.trace.to_bytes(sample.tokens)
    assert not refused(data)
    assert refused(data[: int(cut * len(data))])
    flipped = bytearray(data)
    flipped[int(cut * len(data))] ^= 1 << bit
    assert refused(bytes(flipped))


def test_a_record_of_another_sequence_does_not_fit_these_tokens() -> None:
    """The whole record, checksums and all: only the tokens tell."""
    from r3.errors import RoutingError

    one, other = samples()[1][:2]
    with pytest.raises(RoutingError, match="do not belong together"):
        other.trace.verify(one.tokens)


def test_the_table_of_the_documentation_can_be_made() -> None:
    script = [sys.executable, ROOT / "scripts" / "docs" / "corruption.py", "--trials", "3", "--print"]
    result = subprocess.run(script, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    page = (ROOT / "docs" / "checks.md").read_text()
    assert len(lines) > len(CHANGES)
    for line in lines:
        assert f"\n|{line.split('|')[1]}|" in page, f"docs/checks.md lacks {line}"
