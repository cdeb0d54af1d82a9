"""Payloads that no engine would send: every one ends in a `RoutingError`, and none makes anything of its own size."""

from __future__ import annotations

import base64
import io
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r3.errors import RoutingError
from r3.rollout.wire import decode_lightllm, decode_sglang, decode_vllm
from r3.types import ModelSpec

MODEL = ModelSpec("qwen3_moe", 6, (1, 2, 4, 5), 16, 4, 64, 100)
TOKENS = np.arange(10, 22, dtype=np.int32)
WHO: dict[str, Any] = {"request": 7, "weight_version": 3, "engine": "test"}
MEMORY_BOUND = 4 << 20  # bytes, for a payload of at most a few KiB


def npy(header: str, body: bytes = b"", version: bytes = b"\x01\x00") -> str:
    length = len(header).to_bytes(2, "little") if version == b"\x01\x00" else len(header).to_bytes(4, "little")
    return base64.b64encode(b"\x93NUMPY" + version + length + header.encode() + body).decode()


def head(descr: str = "'|u1'", fortran: str = "False", shape: str = "(11, 6, 4)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n"


def pickled() -> str:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return base64.b64encode(file.getvalue()).decode()


HOSTILE = {
    "a pickle": (pickled(), "is object in C order"),
    "a shape beyond memory": (npy(head(shape="(1099511627776, 6, 4)")), "need .11, 6, 4"),
    "a shape that overflows": (npy(head(shape="(-11, -6, 4)")), "need .11, 6, 4"),
    "no axes": (npy(head(shape="()")), "need .11, 6, 4"),
    "columns first": (npy(head(fortran="True"), bytes(264)), "Fortran order"),
    "big-endian": (npy(head("'>i2'"), bytes(528)), "are required"),
    "floats": (npy(head("'<f4'"), bytes(1056)), "float32 in C order"),
    "fields": (npy(head("[('a', '<i4')]"), bytes(1056)), "are required"),
    "a header longer than its limit": (npy(head() + " " * 4000, bytes(264)), "not a .npy file"),
    "version 2": (npy(head(), bytes(264), b"\x02\x00"), "version"),
    "version 9": (npy(head(), bytes(264), b"\x09\x00"), "version"),
    "deep brackets": (npy("(" * 500), "not a .npy file"),
    "a header of Python 2": (npy(head(shape="(11L, 6L, 4L)"), bytes(264)), "not a .npy file"),
    "a call": (npy("__import__('os').abort()"), "not a .npy file"),
    "no file": (base64.b64encode(b"PK\x03\x04").decode(), "not a .npy file"),
    "nothing": ("", "not a .npy file"),
    "rows cut off": (npy(head(), bytes(263)), "263 bytes behind its header"),
    "rows too many": (npy(head(), bytes(265)), "265 bytes behind its header"),
}


@pytest.mark.parametrize(("payload", "message"), HOSTILE.values(), ids=HOSTILE)
def test_npy_files_that_no_engine_sends(payload: str, message: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(RoutingError, match=message):
            decode_vllm(payload, TOKENS, MODEL, **WHO)
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BOUND
    finally:
        tracemalloc.stop()


FIELDS = {
    "a list": ([1, 2], "is a list"),
    "text": ("routes", "is a str"),
    "no dtype": ({"shape": [11, 4, 4], "data": ""}, "lacks the texts dtype and data"),
    "data as bytes": ({"shape": [11, 4, 4], "dtype": "uint8", "data": b""}, "lacks the texts"),
    "shape as text": ({"shape": "11,4,4", "dtype": "uint8", "data": ""}, "three sizes"),
    "shape of floats": ({"shape": [11.0, 4, 4], "dtype": "uint8", "data": ""}, "three sizes"),
    "shape of truth": ({"shape": [True, True, True], "dtype": "uint8", "data": ""}, "three sizes"),
    "shape beyond memory": ({"shape": [1 << 62, 4, 4], "dtype": "uint8", "data": ""}, "need .11, 4, 4. .token-major"),
    "object": ({"shape": [11, 4, 4], "dtype": "object", "data": ""}, "dtype is 'object'"),
    "empty data": ({"shape": [11, 4, 4], "dtype": "uint8", "data": ""}, "0 bytes"),
}


@pytest.mark.parametrize(("payload", "message"), FIELDS.values(), ids=FIELDS)
def test_lightllm_fields_that_no_server_sends(payload: object, message: str) -> None:
    with pytest.raises(RoutingError, match=message):
        decode_lightllm(payload, TOKENS, MODEL, **WHO)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["shape", "dtype", "data", "x"]), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(payload=JSON)
def test_any_json_is_refused_and_nothing_else_happens(payload: Any) -> None:
    for decode in (decode_lightllm, decode_sglang, decode_vllm):
        if decode is not decode_lightllm and not (payload is None or isinstance(payload, str)):
            continue
        with pytest.raises(RoutingError):
            decode(payload, TOKENS, MODEL, **WHO)


@settings(max_examples=300, deadline=None)
@given(raw=st.binary(max_size=300), header=st.booleans())
def test_any_bytes_are_refused_and_nothing_else_happens(raw: bytes, header: bool) -> None:
    data = b"\x93NUMPY\x01\x00" + len(raw).to_bytes(2, "little") + raw if header else raw
    text = base64.b64encode(data).decode()
    for decode in (decode_sglang, decode_vllm):
        with pytest.raises(RoutingError):
            decode(text, TOKENS, MODEL, **WHO)


def test_a_meta_info_of_another_kind_is_refused() -> None:
    for payload in (7, [1], {"a": 1}):
        for decode in (decode_sglang, decode_vllm):
            with pytest.raises(RoutingError, match="not base64"):
                decode(payload, TOKENS, MODEL, **WHO)  # type: ignore[operator]
