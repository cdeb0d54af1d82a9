"""Checksums are those of zlib, whichever library makes them."""

from __future__ import annotations

import importlib
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r3 import crc


@given(data=st.binary(max_size=3000), begin=st.integers(0, 2**32 - 1))
def test_the_values_are_those_of_zlib(data: bytes, begin: int) -> None:
    assert crc.crc32(data) == zlib.crc32(data)
    assert crc.crc32(memoryview(data), begin) == zlib.crc32(data, begin)


def test_isal_is_what_an_installation_sums_with() -> None:
    assert crc.IMPLEMENTATION == "isal"


def test_zlib_stands_in_where_isal_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "isal.isal_zlib", None)
            importlib.reload(crc)
            assert (crc.IMPLEMENTATION, crc.crc32) == ("zlib", zlib.crc32)
    finally:
        importlib.reload(crc)
    assert crc.IMPLEMENTATION == "isal"
