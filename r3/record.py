"""The wire form of routing records, for files and HTTP: `docs/record.md` describes it byte by byte.

Reference reader and writer; numpy only. Every size in the header is compared with the bytes that are there before
anything is read or allocated by it, so a reader takes at most 16 times its input and 1 MiB; whatever is wrong raises
`RoutingError`.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from r3.crc import crc32
from r3.errors import CheckpointError, RoutingError
from r3.routing import Provenance, RoutingTrace, Span, TokenIds, expert_dtype, rows_checksum

Buffer = bytes | bytearray | memoryview | mmap.mmap

# As in PNG: a byte that is not ASCII, and line ends that a transfer in text mode would change.
MAGIC = b"\x89R3\r\n\x1a\n\x00"
VERSION = 1
_HEADER = struct.Struct("<8sHHIQQIIIBBHIIQIIII")
_SPAN = struct.Struct("<QQq")
# In the header: where the checksum of everything but rows and tokens stands, and the length of the whole record.
_META = _HEADER.size - 4
_LENGTH = struct.Struct("<16xQ")
_HAS_TOKENS = 1
_PROVENANCES: tuple[Provenance, ...] = ("unknown", "exact")
# A position is an int64, a layer index is below 65,536: more of either is no model, and would cost a reader memory.
_POSITIONS, _LAYERS = 2**63, 2**16


@dataclass(frozen=True, slots=True)
class Stored:
    """A record as it was read, with the token ids `[S]` of its sequence where the writer put them in."""

    trace: RoutingTrace
    tokens: TokenIds | None


class Fault(NamedTuple):
    """What is wrong with a stored record, and the check that found it: `layout`, `header`, `rows`, `tokens`..."""

    check: str
    message: str


class Frame(NamedTuple):
    """Where a record lies in a buffer of several: its number from 0, its offset, its bytes."""

    number: int
    offset: int
    data: memoryview


class _Header(NamedTuple):
    magic: bytes
    version: int
    header_bytes: int
    flags: int
    record_bytes: int
    rows: int
    layers: int
    top_k: int
    num_experts: int
    id_bytes: int
    provenance: int
    reserved: int
    spans: int
    engine_bytes: int
    tokens: int
    crc32: int
    rows_crc32: int
    padding: int
    meta_crc32: int


class _Sections(NamedTuple):
    """Where the parts of a record begin; each is padded with zeros to a multiple of 8 bytes."""

    layers: int
    spans: int
    engine: int
    tokens: int
    rows: int
    end: int


@dataclass(frozen=True, slots=True)
class _Parsed:
    """A record whose sizes fit its bytes; nothing else is known to be right."""

    data: memoryview
    header: _Header
    sections: _Sections
    stored: Stored


def encode(trace: RoutingTrace, tokens: TokenIds | None = None) -> bytes:
    """Return the wire form of a record, with the token ids `[S]` of its sequence when given.

    Raises `RoutingError` for a record that is wrong or belongs to other tokens.
    """
    trace.validate(len(tokens) if tokens is not None else _least_tokens(trace.spans))
    if tokens is not None:
        trace.verify(tokens)
    if trace.layers[-1] >= _LAYERS:
        raise RoutingError(f"layer {trace.layers[-1]} does not fit the wire form, which ends at {_LAYERS - 1}")
    layers = np.array(trace.layers, dtype="<u4").tobytes()
    try:
        engine = trace.engine.encode()
        spans = b"".join(_SPAN.pack(*span) for span in trace.spans)
    except (UnicodeEncodeError, struct.error) as error:
        raise RoutingError(f"engine {trace.engine!r} or spans do not fit the wire form: {error}") from error
    ids = np.ascontiguousarray(tokens, dtype="<i4").tobytes() if tokens is not None else b""
    rows = np.ascontiguousarray(trace.experts, dtype=trace.experts.dtype.newbyteorder("<"))
    sections = _sections(len(trace.layers), len(trace.spans), len(engine), len(ids), rows.nbytes)
    header = _Header(
        magic=MAGIC,
        version=VERSION,
        header_bytes=_HEADER.size,
        flags=_HAS_TOKENS if tokens is not None else 0,
        record_bytes=sections.end,
        rows=trace.rows,
        layers=len(trace.layers),
        top_k=trace.top_k,
        num_experts=trace.num_experts,
        id_bytes=rows.itemsize,
        provenance=_PROVENANCES.index(trace.provenance),
        reserved=0,
        spans=len(trace.spans),
        engine_bytes=len(engine),
        tokens=len(tokens) if tokens is not None else 0,
        crc32=trace.crc32,
        rows_crc32=rows_checksum(trace.experts),
        padding=0,
        meta_crc32=0,
    )
    made = bytearray(sections.end)
    _HEADER.pack_into(made, 0, *header)
    for begin, part in ((sections.layers, layers), (sections.spans, spans), (sections.engine, engine),
                        (sections.tokens, ids), (sections.rows, rows.reshape(-1).view(np.uint8).data)):  # fmt: skip
        made[begin : begin + len(part)] = part
    struct.pack_into("<I", made, _META, _meta_checksum(memoryview(made), sections))
    return bytes(made)


def decode(data: Buffer) -> Stored:
    """Read the one record that `data` holds; rows and tokens are read-only views of it.

    Raises `RoutingError` that says what is wrong: size fields, checksums, then every structural check of the record.
    """
    frames = list(split(data))
    if len(frames) != 1:
        raise RoutingError(f"{len(frames)} routing records in {len(memoryview(data))} bytes; exactly one is required")
    return _checked(frames[0].data)


def scan(data: Buffer) -> Iterator[Stored]:
    """Yield the records that lie one behind the other in `data`; raise `RoutingError` that names the broken one."""
    for frame in split(data):
        try:
            yield _checked(frame.data)
        except RoutingError as error:
            raise RoutingError(f"record {frame.number} at byte {frame.offset}: {error}") from error


def split(data: Buffer) -> Iterator[Frame]:
    """Yield where each record of `data` lies, by magic number and length alone; raise `RoutingError` where none can."""
    view = memoryview(data).cast("B")
    offset = number = 0
    while offset < len(view):
        rest = view[offset:]
        where = f"record {number} at byte {offset}: "
        if len(rest) < _HEADER.size:
            raise RoutingError(f"{where}{len(rest)} bytes are left, a header has {_HEADER.size}; the file is cut off")
        if rest[: len(MAGIC)] != MAGIC:
            raise RoutingError(f"{where}it begins with {bytes(rest[:8])!r}, a routing record with {MAGIC!r}")
        (length,) = _LENGTH.unpack_from(rest)
        if not _HEADER.size <= length <= len(rest) or length % 8:
            raise RoutingError(
                f"{where}its length is {length}, but {len(rest)} bytes are left; the file is cut off or the length "
                "is wrong (a multiple of 8 is required)"
            )
        yield Frame(number, offset, rest[:length])
        offset, number = offset + length, number + 1


def faults(frame: memoryview) -> tuple[list[Fault], Stored | None]:
    """Run every check on the one record in `frame`; return what is wrong, and the record as far as it can be read."""
    try:
        parsed = _parse(frame)
    except RoutingError as error:
        return [Fault("layout", str(error))], None
    found = []
    for name, check in _CHECKS.items():
        try:
            check(parsed)
        except RoutingError as error:
            found.append(Fault(name, str(error)))
    return found, parsed.stored


def read_records(path: Path) -> Iterator[Stored]:
    """Yield the records of a file, whose rows are views of its mapped pages; raise `RoutingError` for a broken one."""
    yield from scan(map_file(path))


def map_file(path: Path) -> Buffer:
    """Map a file for reading; raise `RoutingError` when it cannot be opened or is empty."""
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise RoutingError(f"{path} is empty")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise RoutingError(f"{path} cannot be read: {error.strerror}") from error


def write_records(path: Path, records: Iterable[tuple[RoutingTrace, TokenIds | None]]) -> int:
    """Write records and their tokens to a file that is whole or absent; return their number.

    Raises `RoutingError` for a record that is wrong, `CheckpointError` where the file cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            for trace, tokens in records:
                file.write(encode(trace, tokens))
                count += 1
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        # Where the folder could not be made there is nothing to remove, and that is the error to show.
        with suppress(OSError):
            part.unlink()
    return count


def _checked(frame: memoryview) -> Stored:
    parsed = _parse(frame)
    for check in _CHECKS.values():
        check(parsed)
    return parsed.stored


def _parse(data: memoryview) -> _Parsed:
    """Read a record after its sizes were compared with its bytes; checksums and content are not looked at."""
    if len(data) < _HEADER.size:
        raise RoutingError(f"{len(data)} bytes; the header of a routing record has {_HEADER.size}")
    header = _Header(*_HEADER.unpack_from(data))
    if (header.magic, header.version, header.header_bytes) != (MAGIC, VERSION, _HEADER.size):
        raise RoutingError(
            f"format version {header.version} with a header of {header.header_bytes} bytes; this reader knows "
            f"version {VERSION} with {_HEADER.size}"
        )
    dtype = expert_dtype(header.num_experts)
    if header.id_bytes != dtype.itemsize:
        raise RoutingError(f"ids have {header.id_bytes} bytes; {header.num_experts} experts need {dtype.itemsize}")
    if not 1 <= header.layers <= _LAYERS or not 1 <= header.top_k <= header.num_experts:
        raise RoutingError(
            f"{header.layers} layers, top-{header.top_k} of {header.num_experts} experts; between 1 and {_LAYERS} "
            "layers and top-k up to the number of experts are possible"
        )
    if header.spans > header.rows:
        raise RoutingError(f"{header.spans} spans for {header.rows} rows; each span has a row at least")
    ids = header.rows * header.layers * header.top_k
    sections = _sections(header.layers, header.spans, header.engine_bytes, 4 * header.tokens, ids * dtype.itemsize)
    if not sections.end == header.record_bytes == len(data):
        raise RoutingError(
            f"{len(data)} bytes with length {header.record_bytes}; {header.rows} rows of {header.layers} layers x "
            f"top-{header.top_k}, {header.spans} spans and {header.tokens} tokens need {sections.end}"
        )
    has_tokens, provenance = header.flags == _HAS_TOKENS, header.provenance
    known = header.flags <= _HAS_TOKENS and provenance < len(_PROVENANCES) and not (header.reserved or header.padding)
    if not known or (header.tokens and not has_tokens):
        raise RoutingError(
            f"flags {header.flags}, provenance {provenance}, {header.tokens} tokens: unknown to version 1"
        )
    layers = np.frombuffer(data, "<u4", header.layers, sections.layers)
    if int(layers.max()) >= _LAYERS:
        raise RoutingError(f"layer {int(layers.max())}; MoE layers have strictly ascending indices below {_LAYERS}")
    experts = np.frombuffer(data, dtype.newbyteorder("<"), ids, sections.rows).astype(dtype, copy=False)
    experts = experts.reshape(header.rows, header.layers, header.top_k)
    trace = RoutingTrace(
        experts=_read_only(experts),
        layers=tuple(layers.tolist()),
        num_experts=header.num_experts,
        spans=_read_spans(data[sections.spans : sections.spans + _SPAN.size * header.spans]),
        engine=_text(data[sections.engine : sections.engine + header.engine_bytes]),
        provenance=_PROVENANCES[provenance],
        crc32=header.crc32,
    )
    tokens = np.frombuffer(data, "<i4", header.tokens, sections.tokens).astype(np.int32, copy=False)
    return _Parsed(data, header, sections, Stored(trace, _read_only(tokens) if has_tokens else None))


def _read_spans(data: memoryview) -> tuple[Span, ...]:
    spans = tuple(Span(*fields) for fields in _SPAN.iter_unpack(data))
    if spans and max(span.end for span in spans) >= _POSITIONS:
        raise RoutingError(f"a span ends at {max(span.end for span in spans)}; positions are below 2**63")
    return spans


def _text(data: memoryview) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise RoutingError(f"the engine's name is not UTF-8 ({error})") from error


def _check_header(parsed: _Parsed) -> None:
    found, expected = _meta_checksum(parsed.data, parsed.sections), parsed.header.meta_crc32
    if found != expected:
        raise RoutingError(f"checksum of the header is {found:#010x}, recorded {expected:#010x}: its bytes changed")


def _check_padding(parsed: _Parsed) -> None:
    header, (layers, spans, engine, tokens, rows, end) = parsed.header, parsed.sections
    paddings = (
        (layers + 4 * header.layers, spans),
        (engine + header.engine_bytes, tokens),
        (tokens + 4 * header.tokens, rows),
        (rows + parsed.stored.trace.experts.nbytes, end),
    )
    for filled, following in paddings:
        if any(parsed.data[filled:following]):
            raise RoutingError(f"bytes {filled} to {following - 1} are padding and not 0; they changed")


def _check_rows(parsed: _Parsed) -> None:
    found, expected = rows_checksum(parsed.stored.trace.experts), parsed.header.rows_crc32
    if found != expected:
        raise RoutingError(f"checksum of the rows is {found:#010x}, recorded {expected:#010x}: routing changed")


def _check_tokens(parsed: _Parsed) -> None:
    """The checksum of rows and tokens goes on from that of the rows, so only the tokens are left to run over."""
    if parsed.stored.tokens is None:
        return
    begin, size = parsed.sections.tokens, 4 * parsed.header.tokens
    found = crc32(parsed.data[begin : begin + size], parsed.header.rows_crc32)
    if found != parsed.header.crc32:
        raise RoutingError(
            f"checksum of rows and tokens is {found:#010x}, recorded {parsed.header.crc32:#010x}: tokens changed, or "
            "the rows are those of another sequence"
        )


def _check_structure(parsed: _Parsed) -> None:
    trace, tokens = parsed.stored.trace, parsed.stored.tokens
    trace.validate(_least_tokens(trace.spans) if tokens is None else len(tokens))
    if tokens is not None:
        trace.check_live(tokens)


_CHECKS: dict[str, Callable[[_Parsed], None]] = {
    "header": _check_header,
    "padding": _check_padding,
    "rows": _check_rows,
    "tokens": _check_tokens,
    "structure": _check_structure,
}


def _sections(layers: int, spans: int, engine: int, tokens: int, rows: int) -> _Sections:
    """Return where the parts begin: number of layers and spans, bytes of engine, tokens and rows."""
    begins = [_HEADER.size]
    for size in (4 * layers, _SPAN.size * spans, engine, tokens, rows):
        begins.append(begins[-1] + -(-size // 8) * 8)
    return _Sections(*begins)


def _meta_checksum(data: memoryview, sections: _Sections) -> int:
    """Return the crc32 of all that is neither rows nor tokens: the header up to this checksum, and the tables."""
    return crc32(data[_HEADER.size : sections.tokens], crc32(data[:_META]))


def _least_tokens(spans: tuple[Span, ...]) -> int:
    """Return the shortest sequence that rows up to the last span can belong to: its last token has none."""
    return spans[-1].end + 1 if spans else 0


def _read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.flags.writeable = False
    return array
