"""The wire form: what is written is read, by its own description alone; every defect is a `RoutingError`."""

from __future__ import annotations

import re
import struct
import tracemalloc
import zlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r3 import record
from r3.errors import RoutingError
from r3.routing import RoutingTrace, Span, checksum
from r3.types import Batch
from tests.command import ROOT
from tests.unit.strategies import distinct_experts, records, records_with_gaps, trajectories

TOKENS = np.arange(100, 160, dtype=np.int32)


def make(num_experts: int = 16, layers: tuple[int, ...] = (1, 2, 5, 6), tokens: np.ndarray = TOKENS) -> RoutingTrace:
    rows = distinct_experts(np.random.default_rng(0), len(tokens) - 1, len(layers), 4, num_experts)
    return RoutingTrace.record(
        rows, tokens, layers=layers, num_experts=num_experts, weight_version=7, engine="sglang 0.5.23"
    )


def same(one: RoutingTrace, other: RoutingTrace) -> bool:
    """Are all fields equal, the rows in value and dtype?"""
    names = [field.name for field in fields(RoutingTrace) if field.name != "experts"]
    return (
        all(getattr(one, name) == getattr(other, name) for name in names)
        and one.experts.dtype == other.experts.dtype
        and np.array_equal(one.experts, other.experts)
    )


@given(records_with_gaps())
def test_every_valid_record_comes_back(made):
    trace, tokens = made
    trace.validate(len(tokens))
    assert same(RoutingTrace.from_bytes(trace.to_bytes()), trace)
    stored = record.decode(trace.to_bytes(tokens))
    assert same(stored.trace, trace)
    assert np.array_equal(stored.tokens, tokens)
    assert stored.tokens.dtype == np.int32


@given(records_with_gaps())
def test_the_form_is_canonical(made):
    trace, tokens = made
    for given_tokens in (None, tokens):
        written = trace.to_bytes(given_tokens)
        assert len(written) % 8 == 0
        assert record.encode(*_pair(record.decode(written))) == written


@given(records(), st.data())
def test_clipped_and_joined_records_come_back(made, data):
    trace, tokens, _ = made
    cut = data.draw(st.integers(0, trace.rows))
    parts = [trace.clip(0, cut, tokens), trace.clip(cut, trace.rows, tokens)]
    head, tail = (RoutingTrace.from_bytes(part.to_bytes(tokens)) for part in parts)
    assert same(head, parts[0])
    assert same(tail, parts[1])
    assert same(RoutingTrace.from_bytes(head.concatenate(tail, tokens).to_bytes()), trace)


@given(trajectories(), st.integers(1, 5))
def test_packed_records_come_back(packed, block_layers):
    batch = Batch.pack(packed, block_layers)
    captured = [t for t in batch.trajectories() if t.routing is not None]
    data = b"".join(t.routing.to_bytes(t.tokens) for t in captured)
    found = list(record.scan(data))
    assert len(found) == len(captured)
    for stored, before in zip(found, captured, strict=True):
        assert same(stored.trace, before.routing)
        assert np.array_equal(stored.tokens, before.tokens)


def test_the_bytes_are_where_the_documentation_says():
    """A reader of its own, written from docs/record.md: `struct` and offsets, nothing of ours."""
    trace = make(num_experts=300)
    data = trace.to_bytes(TOKENS)
    assert data[:8] == b"\x89R3\r\n\x1a\n\0"
    version, header, flags, length, rows, layers, k, experts = struct.unpack_from("<HHIQQIII", data, 8)
    assert (version, header, flags, length) == (1, 80, 1, len(data))
    assert (rows, layers, k, experts) == (59, 4, 4, 300)
    width, provenance, zero, spans, engine, tokens = struct.unpack_from("<BBHIIQ", data, 44)
    assert (width, provenance, zero, spans, engine, tokens) == (2, 0, 0, 1, 13, 60)
    crc32, rows_crc32, zero, meta_crc32 = struct.unpack_from("<IIII", data, 64)
    assert zero == 0
    assert struct.unpack_from("<4I", data, 80) == (1, 2, 5, 6)
    assert struct.unpack_from("<QQq", data, 96) == (0, 59, 7)
    assert data[120:136] == b"sglang 0.5.23\0\0\0"
    assert struct.unpack_from("<60i", data, 136) == tuple(TOKENS.tolist())
    begin, size = 136 + 240, 59 * 4 * 4 * 2
    assert begin % 8 == 0
    assert np.array_equal(np.frombuffer(data, "<u2", size // 2, begin).reshape(59, 4, 4), trace.experts)
    assert zlib.crc32(data[begin : begin + size]) == rows_crc32
    assert zlib.crc32(data[136:376], rows_crc32) == crc32 == trace.crc32
    assert zlib.crc32(data[80:136], zlib.crc32(data[:76])) == meta_crc32


@given(records_with_gaps(), st.booleans())
def test_the_reader_that_the_documentation_shows_reads_every_record(made, with_tokens):
    trace, tokens = made
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "record.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    ids, layers, spans, found = names["read"](trace.to_bytes(tokens if with_tokens else None))
    assert np.array_equal(ids, trace.experts)
    assert tuple(layers.tolist()) == trace.layers
    assert [tuple(span) for span in spans.tolist()] == [tuple(span) for span in trace.spans]
    assert np.array_equal(found, tokens) if with_tokens else found is None


def test_rows_are_a_read_only_view_of_the_bytes():
    data = bytearray(make().to_bytes(TOKENS))
    stored = record.decode(data)
    whole = np.frombuffer(data, np.uint8)
    assert np.shares_memory(stored.trace.experts, whole)
    assert np.shares_memory(stored.tokens, whole)
    assert not stored.trace.experts.flags.writeable
    assert stored.trace.experts.flags.aligned


@given(records_with_gaps(), st.booleans(), st.data())
def test_any_flipped_bit_is_found(made, with_tokens, data):
    trace, tokens = made
    written = bytearray(trace.to_bytes(tokens if with_tokens else None))
    written[data.draw(st.integers(0, len(written) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(RoutingError):
        record.decode(written)


@given(records_with_gaps(), st.data())
def test_any_cut_is_found(made, data):
    trace, tokens = made
    written = trace.to_bytes(tokens)
    with pytest.raises(RoutingError):
        record.decode(written[: data.draw(st.integers(0, len(written) - 1))])


def sealed(data: bytes, offset: int, form: str, value: int) -> bytes:
    """Change a field and make the checksum of the header right again, as a writer with a bug would."""
    changed = bytearray(data)
    struct.pack_into(form, changed, offset, value)
    return seal(changed)


def seal(changed: bytearray) -> bytes:
    layers, spans, engine = (struct.unpack_from("<I", changed, at)[0] for at in (32, 48, 52))
    tables = 80 + -(-4 * layers // 8) * 8 + 24 * spans + -(-engine // 8) * 8
    if tables <= len(changed):
        struct.pack_into("<I", changed, 76, zlib.crc32(changed[80:tables], zlib.crc32(changed[:76])))
    return bytes(changed)


HUGE = 2**60
WRONG_FIELDS = {
    "version": (8, "<H", 2, "format version 2"),
    "header size": (10, "<H", 88, "header of 88 bytes"),
    "unknown flag": (12, "<I", 2, "flags 2"),
    "reserved field": (46, "<H", 1, "unknown to version 1"),
    "second reserved field": (72, "<I", 1, "unknown to version 1"),
    "tokens without flag": (12, "<I", 0, "60 tokens: unknown"),
    "length": (16, "<Q", HUGE, "length is 1152921504606846976"),
    "length of nothing": (16, "<Q", 0, "length is 0"),
    "rows": (24, "<Q", HUGE, f"{HUGE} rows"),
    "one row more": (24, "<Q", 60, "60 rows"),
    "layers": (32, "<I", 2**31, "2147483648 layers"),
    "no layers": (32, "<I", 0, "0 layers"),
    "top-k": (36, "<I", 2**31, "top-2147483648 of 16"),
    "top-k of none": (36, "<I", 0, "top-0"),
    "experts": (40, "<I", 2**31, "between 1 and 65,536"),
    "no experts": (40, "<I", 0, "num_experts is 0"),
    "experts of another width": (40, "<I", 300, "ids have 1 bytes; 300 experts need 2"),
    "width": (44, "<B", 2, "ids have 2 bytes; 16 experts need 1"),
    "provenance": (45, "<B", 2, "provenance 2"),
    "spans": (48, "<I", 2**31, "2147483648 spans for 59 rows"),
    "engine": (52, "<I", 2**31, "need"),
    "tokens": (56, "<Q", HUGE, f"{HUGE} tokens"),
    "fewer experts": (40, "<I", 8, "expert id 15 is outside [0, 8)"),
    "layer order": (80, "<I", 9, "strictly ascending"),
    "layer beyond every model": (92, "<I", 2**31, "strictly ascending indices below"),
    "span begin": (96, "<Q", 5, "do not add up to the 59 recorded rows"),
    "span beyond the tokens": (104, "<Q", HUGE, "do not add up"),
    "span beyond an int64": (104, "<Q", 2**63, "positions are below"),
    "engine that is no text": (120, "<B", 255, "not UTF-8"),
    "tokens of another sequence": (136, "<I", 5, "rows and tokens"),
    "rows of another sequence": (376, "<B", 7, "checksum of the rows"),
}  # fmt: skip


@pytest.mark.parametrize(("offset", "form", "value", "message"), WRONG_FIELDS.values(), ids=WRONG_FIELDS)
def test_a_wrong_field_is_named_and_costs_no_memory(offset, form, value, message):
    data = sealed(make().to_bytes(TOKENS), offset, form, value)
    tracemalloc.start()
    with pytest.raises(RoutingError) as caught:
        record.decode(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert message in str(caught.value)
    assert peak < 2**20, "a size field was believed before it was compared with the bytes that are there"


def greedy_records() -> list[tuple[RoutingTrace, np.ndarray]]:
    """Valid records in which little input becomes many objects: a span for every row, all layers, rows of one id."""
    rows, spans = 200_000, tuple(Span(2 * i, 2 * i + 1, i) for i in range(20_000))
    return [
        (one_id(len(spans), spans), np.zeros(40_001, np.int32)),
        (one_id(rows, (Span(0, rows, 1),)), np.zeros(rows + 1, np.int32)),
        (replace(one_id(1, (Span(0, 1, 1),)), layers=tuple(range(2**16)), experts=np.zeros((1, 2**16, 1), np.uint8)),
         np.zeros(2, np.int32)),
    ]  # fmt: skip


def one_id(rows: int, spans: tuple[Span, ...]) -> RoutingTrace:
    return RoutingTrace(np.zeros((rows, 1, 1), np.uint8), (0,), 2, spans, "e", "unknown", 0)


@pytest.mark.parametrize("i", range(3))
def test_reading_takes_a_bounded_multiple_of_the_input(i):
    trace, tokens = greedy_records()[i]
    data = replace(trace, crc32=checksum(trace.experts, tokens)).to_bytes(tokens)
    tracemalloc.start()
    record.decode(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * len(data) + 2**20


def test_a_flipped_bit_in_a_sealed_row_is_found_by_its_structure():
    """Rows and checksums that agree are still no record of a router that names an expert twice."""
    trace = make()
    rows = trace.experts.copy()
    rows[3, 2, 1] = rows[3, 2, 0]
    wrong = replace(trace, experts=rows, crc32=checksum(rows, TOKENS))
    with pytest.raises(RoutingError, match="row 3, layer 5 repeats an expert"):
        wrong.to_bytes()
    data = bytearray(trace.to_bytes(TOKENS))
    data[376 : 376 + rows.nbytes] = rows.tobytes()
    struct.pack_into("<II", data, 64, wrong.crc32, zlib.crc32(rows.tobytes()))
    with pytest.raises(RoutingError, match="row 3, layer 5 repeats an expert"):
        record.decode(seal(data))
    found, stored = record.faults(memoryview(seal(data)))
    assert [fault.check for fault in found] == ["structure"]
    assert stored.trace.rows == 59


def test_padding_that_changed_is_found():
    tokens = np.arange(62, dtype=np.int32)[:61]
    data = make(layers=(1, 2, 5), tokens=tokens).to_bytes(tokens)
    rows_end = 80 + 16 + 24 + 16 + 248 + 60 * 12
    assert rows_end == len(data) == 1104
    for at in (93, 134, 136 + 244):
        assert data[at] == 0
        changed = bytearray(data)
        changed[at] = 1
        with pytest.raises(RoutingError, match="padding and not 0"):
            record.decode(seal(changed))
    bare = bytearray(make(layers=(1, 2, 5), tokens=tokens[:1]).to_bytes())
    bare[-1] = 1
    with pytest.raises(RoutingError, match="padding and not 0"):
        record.decode(seal(bare))


def test_records_lie_one_behind_the_other(tmp_path: Path):
    traces = [make(layers=tuple(range(n))) for n in (1, 2, 3)]
    file = tmp_path / "new" / "some.r3"
    assert record.write_records(file, [(trace, TOKENS) for trace in traces]) == 3
    assert [path.name for path in file.parent.iterdir()] == ["some.r3"]
    found = list(record.read_records(file))
    assert all(same(stored.trace, trace) for stored, trace in zip(found, traces, strict=True))
    assert [frame.offset % 8 for frame in record.split(file.read_bytes())] == [0, 0, 0]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path):
    file = tmp_path / "some.r3"
    record.write_records(file, [(make(), None)])
    before = file.read_bytes()
    wrong = replace(make(), crc32=1)
    with pytest.raises(RoutingError, match="checksum"):
        record.write_records(file, [(make(), None), (wrong, TOKENS)])
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["some.r3"]


def test_the_broken_one_of_several_is_named():
    one = make().to_bytes()
    two = bytearray(one)
    two[-3] ^= 1
    records_ = record.scan(one + two)
    assert next(records_).trace.rows == 59
    with pytest.raises(RoutingError, match=rf"record 1 at byte {len(one)}: checksum of the rows"):
        next(records_)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one + b"text", "record 1 at byte [0-9]+: 4 bytes are left"),
        (lambda one: one + bytes(200), r"record 1 at byte [0-9]+: it begins with b'\\x00"),
        (lambda one: one + one[:-8], "record 1 at byte [0-9]+: its length is"),
        (lambda one: b"\x89R3\n" + one[5:], "record 0 at byte 0: it begins with"),
    ],
)
def test_what_is_no_record_is_refused_at_its_byte(change, message):
    with pytest.raises(RoutingError, match=message):
        list(record.scan(change(make().to_bytes())))


def test_one_record_means_one():
    data = make().to_bytes()
    for wrong, count in ((b"", 0), (data + data, 2)):
        with pytest.raises(RoutingError, match=f"{count} routing records"):
            record.decode(wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "\ud800"}, "do not fit the wire form"),
        ({"spans": (Span(0, 59, 2**63),)}, "do not fit the wire form"),
        ({"layers": (1, 2, 5, 2**16)}, "layer 65536 does not fit"),
        ({"layers": (-1, 2, 5, 6)}, "strictly ascending"),
        ({"spans": ()}, "do not add up"),
    ],
)
def test_what_does_not_fit_the_form_is_not_written(change, message):
    with pytest.raises(RoutingError, match=message):
        replace(make(), **change).to_bytes()


@pytest.mark.parametrize("name", ["missing.r3", "empty.r3", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str):
    (tmp_path / "empty.r3").touch()
    with pytest.raises(RoutingError, match=r"(cannot be read|is empty)"):
        list(record.read_records(tmp_path / name))


def _pair(stored: record.Stored) -> tuple[RoutingTrace, np.ndarray | None]:
    return stored.trace, stored.tokens
