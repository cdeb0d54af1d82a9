"""Shared memory between an engine's scheduler and the rollout process: one writes records, the other reads them.

The rollout process makes the segment (`Owner`), the scheduler maps it (`Writer`). It is an anonymous file
(`memfd_create`): it has no name in any file system, so nothing can be left behind and nothing is to be cleaned at a
start; the kernel frees it when the last process that maps it is gone, whatever ended it.

Its bytes are a ring of records and never grow. A record's place is taken back when the reader let go of it (the arrays
that view it are gone), or when it was never read and the reader gave up everything issued so far (`abandon`): answers
of a call that failed, aborted requests. A writer that finds no room is told so (`allocate` returns None) and sends the
rows another way. Records are taken back in the order in which they were made.

Layout, int64 words: file header of 64 bytes `[magic, issued, abandoned, prefaulted, newest]`; then records, each a
header of 64 bytes `[ticket, state, data bytes, trailer bytes, data bytes reserved, bytes of the whole]`, the data and
the trailer. `newest` is the place of the record that was issued last. Only the writer sets `pending`, `ready` and
`failed`, only the reader `taken` and `released`.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from r3.errors import RoutingError

MAGIC = 0x5233524F57530001
_ALIGN = 64
_MAGIC, _ISSUED, _ABANDONED, _PREFAULTED, _NEWEST = range(5)
_TICKET, _STATE, _DATA, _TRAILER, _RESERVED, _PLACE = range(6)
_PENDING, _READY, _FAILED, _TAKEN, _RELEASED = range(1, 6)
_POLL_S = (0.00005, 0.00025)
_REASON = 256  # bytes behind any record that can say why there is none

_LOCK = threading.Lock()

Bytes = NDArray[np.uint8]


class Ticket(NamedTuple):
    """What travels instead of a record: its number, ascending from 1, and where it begins in the segment."""

    number: int
    offset: int


@dataclass(frozen=True, slots=True)
class Taken:
    """A record as the reader sees it. `data` uint8 `[bytes]`, a read-only view of the segment that keeps the record in
    place; `trailer`: a copy.
    """

    data: Bytes
    trailer: bytes


class _Mapped:
    """The file mapped into this process, and its words."""

    def __init__(self, descriptor: int, *, populate: bool = False) -> None:
        # Populated, reading a record for the first time meets no page fault.
        self.memory = mmap.mmap(descriptor, 0, mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0))
        self.bytes: Bytes = np.frombuffer(self.memory, np.uint8)
        self.words: NDArray[np.int64] = self.bytes.view(np.int64)
        self._ints = memoryview(self.memory).cast("q")  # reading one number takes a quarter of what numpy takes

    def word(self, offset: int, index: int) -> int:
        return self._ints[offset // 8 + index]

    def set_word(self, offset: int, index: int, value: int) -> None:
        self._ints[offset // 8 + index] = value

    def data(self, offset: int) -> Bytes:
        """Return the data of the record at `offset`, a view."""
        return np.frombuffer(self.memory, np.uint8, self.word(offset, _DATA), offset + _ALIGN)


class Owner:
    """The rollout process's side: makes the segment, reads records, lets go of them."""

    def __init__(self, size: int, *, prefault: bool = False) -> None:
        """Make a segment of `size` bytes; `prefault` takes its memory now instead of when it is first used.

        Raises `OSError` where the system has no such file or not the memory.
        """
        if prefault:
            _require_memory(size)
        self._descriptor = os.memfd_create("r3-routing", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._descriptor, _aligned(size))
            if prefault:
                os.posix_fallocate(self._descriptor, 0, _aligned(size))
            self._mapped = _Mapped(self._descriptor, populate=prefault)
        except OSError:
            os.close(self._descriptor)
            raise
        self._mapped.set_word(0, _MAGIC, MAGIC)
        self._mapped.set_word(0, _PREFAULTED, prefault)
        self._seen, self._end = 0, _ALIGN  # the last record that `look_ahead` came past, and where it ends

    @property
    def path(self) -> str:
        """Where a child process can open the segment while this process holds it."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    @property
    def size(self) -> int:
        """Bytes of the segment."""
        return len(self._mapped.bytes)

    def take(self, ticket: Ticket, timeout_s: float) -> Taken:
        """Wait for a record and return views of it; it stays in place until the last of them is gone.

        Raises `RoutingError` for a record that was given up, that the writer could not write, or that is not there
        after `timeout_s`.
        """
        mapped = self._mapped
        self.wait(ticket, timeout_s)
        behind = ticket.offset + _ALIGN + mapped.word(ticket.offset, _RESERVED)
        trailer = bytes(mapped.bytes[behind:][: mapped.word(ticket.offset, _TRAILER)])
        if mapped.word(ticket.offset, _STATE) == _FAILED:
            mapped.set_word(ticket.offset, _STATE, _RELEASED)
            raise RoutingError(f"the engine could not return its routing: {trailer.decode(errors='replace')}")
        mapped.set_word(ticket.offset, _STATE, _TAKEN)
        data = mapped.data(ticket.offset)
        data.flags.writeable = False
        # Views of this array have it as their base, so it dies with the last of them.
        release = weakref.finalize(data, mapped.set_word, ticket.offset, _STATE, _RELEASED)
        release.atexit = False
        return Taken(data, trailer)

    def look_ahead(self) -> Iterator[tuple[Ticket, Bytes]]:
        """Yield the data of records that are ready and not taken, in the order in which they were made, each once.

        It ends at the first that is not written yet, where the next call goes on. Nothing is taken: a record can still
        be, and its data, a view, is valid until it is given up.
        """
        while (ticket := self._next()) is not None:
            state = self._mapped.word(ticket.offset, _STATE)
            if state == _PENDING:
                return
            self._pass(ticket)
            if state == _READY:
                _fence()
                yield ticket, self._mapped.data(ticket.offset)

    def _next(self) -> Ticket | None:
        """Return the record behind the last that was passed; it lies there or at the segment's beginning."""
        mapped, number = self._mapped, self._seen + 1
        if mapped.word(0, _ISSUED) >= number:
            _fence()
            for offset in dict.fromkeys((self._end, _ALIGN)):
                if offset + _ALIGN <= self.size and mapped.word(offset, _TICKET) == number:
                    return Ticket(number, offset)
        return None

    def _pass(self, ticket: Ticket) -> None:
        self._seen, self._end = ticket.number, ticket.offset + self._mapped.word(ticket.offset, _PLACE)

    def abandon(self) -> None:
        """Give up every record issued so far that was not taken."""
        issued, newest = (self._mapped.word(0, index) for index in (_ISSUED, _NEWEST))
        if issued:
            # Their places may be overwritten from now on, so `look_ahead` does not come past them any more.
            self._pass(Ticket(issued, newest))
        self._mapped.set_word(0, _ABANDONED, issued)

    def close(self) -> None:
        """Let go of the segment; it lives on while arrays of it, or its writer, do."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def wait(self, ticket: Ticket, timeout_s: float) -> None:
        """Return once a record can be taken; raise `RoutingError` as `take` does."""
        deadline = time.monotonic() + timeout_s
        pause, longest = _POLL_S
        while True:
            found = self._mapped.word(ticket.offset, _TICKET)
            if found != ticket.number:
                raise RoutingError(f"record {ticket.number} was given up before it was read; {found} is in its place")
            state = self._mapped.word(ticket.offset, _STATE)
            if state in (_READY, _FAILED):
                _fence()
                return
            if state != _PENDING:
                raise RoutingError(f"record {ticket.number} was read already; a record can be read once")
            if time.monotonic() > deadline:
                raise RoutingError(f"record {ticket.number} was not written within {timeout_s:g} s; is the engine up?")
            time.sleep(pause)
            pause = min(2 * pause, longest)


class Slot:
    """A record's place while it is written. `data`: uint8 `[bytes]`, the place itself."""

    def __init__(self, mapped: _Mapped, ticket: Ticket, data: int, trailer: int) -> None:
        self.ticket = ticket
        self._mapped = mapped
        begin = ticket.offset + _ALIGN
        self._reserved = _aligned(data)
        self.data = mapped.bytes[begin : begin + data]
        self._trailer = mapped.bytes[begin + self._reserved : begin + self._reserved + trailer]

    def publish(self, trailer: bytes = b"") -> None:
        """Let the reader have the record, with `trailer` behind its data; fail it where that has no room."""
        if len(trailer) > len(self._trailer):
            self.fail(f"{len(trailer)} bytes beside the rows have no room in {len(self._trailer)}")
            return
        self._write(trailer, _READY)

    def fail(self, reason: str) -> None:
        """Tell the reader why there is no record."""
        self._write(reason.encode()[: len(self._trailer)], _FAILED)

    def _write(self, trailer: bytes, state: int) -> None:
        mapped, offset = self._mapped, self.ticket.offset
        self._trailer[: len(trailer)] = np.frombuffer(trailer, np.uint8)
        mapped.set_word(offset, _TRAILER, len(trailer))
        _fence()
        mapped.set_word(offset, _STATE, state)


class Writer:
    """The scheduler's side: makes records in a ring. Used from one thread."""

    def __init__(self, path: str) -> None:
        """Map the segment at `path`; raise `RoutingError` when it is none."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._mapped = _Mapped(descriptor)
        finally:
            os.close(descriptor)
        if self._mapped.word(0, _MAGIC) != MAGIC:
            raise RoutingError(f"{path} is no segment of routing records, or of another release")
        if self._mapped.word(0, _ISSUED):
            raise RoutingError(f"{path} has had a writer, whose records a second one would overwrite; make a new one")
        self._live: deque[tuple[int, int]] = deque()  # (begin, end) of every record, oldest first
        self._next = _ALIGN
        self._issued = 0

    @property
    def size(self) -> int:
        """Bytes of the segment."""
        return len(self._mapped.bytes)

    def touch(self) -> None:
        """Write a byte of every page of a segment whose memory is there, so that filling a record meets no page fault.

        One whose memory is taken as it is used stays as small as the records that are in it at once.
        """
        if self._mapped.word(0, _PREFAULTED):
            self._mapped.bytes[mmap.PAGESIZE :: mmap.PAGESIZE] = 0

    def allocate(self, data: int, trailer: int = 0) -> Slot | None:
        """Return a place for `data` bytes and at least `trailer` behind them; None while the segment has no room."""
        trailer = max(trailer, _REASON)
        need = footprint(data, trailer)
        self._reclaim()
        begin = self._room(need)
        if begin is None:
            return None
        self._issued += 1
        self._live.append((begin, begin + need))
        self._next = begin + need
        words = self._mapped.words[begin // 8 : begin // 8 + 8]
        words[:] = 0
        words[[_TICKET, _STATE, _DATA, _RESERVED, _PLACE]] = self._issued, _PENDING, data, _aligned(data), need
        self._mapped.set_word(0, _NEWEST, begin)
        _fence()
        self._mapped.set_word(0, _ISSUED, self._issued)
        return Slot(self._mapped, Ticket(self._issued, begin), data, trailer)

    def _room(self, need: int) -> int | None:
        if not self._live:
            return _ALIGN if _ALIGN + need <= self.size else None
        oldest = self._live[0][0]
        if self._next > oldest:  # the used part does not wrap around
            if self._next + need <= self.size:
                return self._next
            return _ALIGN if _ALIGN + need <= oldest else None
        return self._next if self._next + need <= oldest else None

    def _reclaim(self) -> None:
        mapped, abandoned = self._mapped, self._mapped.word(0, _ABANDONED)
        while self._live:
            begin = self._live[0][0]
            state, ticket = mapped.word(begin, _STATE), mapped.word(begin, _TICKET)
            if state != _RELEASED and not (state in (_READY, _FAILED) and ticket <= abandoned):
                return
            self._live.popleft()


def _fence() -> None:
    """Keep what was written or read before apart from what follows, on processors that reorder them (not x86).

    Letting go of a lock and taking another is the one full barrier that the interpreter offers.
    """
    for _ in range(2):
        with _LOCK:
            pass


def _aligned(size: int) -> int:
    return -(-max(size, 1) // _ALIGN) * _ALIGN


def _require_memory(size: int) -> None:
    """Raise `OSError` where there is not that much to be had: taking it all the same would end other processes."""
    available = available_memory()
    if size > available // 2:
        raise OSError(errno.ENOMEM, f"{size >> 20} MiB are more than half of the {available >> 20} MiB available")


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that this process can still take: what the host has, or less where a cgroup (v2) bounds it.

    A limit holds for everything below it, so those of all parents count. Files that are cached and were not used lately
    are no use of memory, as for Kubernetes' working set: weights that were read once would fill any limit.
    """
    lines = (proc / "meminfo").read_text().splitlines()
    room = [next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))]
    try:
        names = (proc / "self" / "cgroup").read_text().splitlines()
    except FileNotFoundError:
        names = []
    for name in (line.removeprefix("0::").lstrip("/") for line in names if line.startswith("0::")):
        # Inside a container the name may be that of the host, and its own files lie at the top.
        for folder in (cgroups / name, *(cgroups / parent for parent in Path(name).parents)):
            room += _room_in(folder)
    return max(0, min(room))


def _room_in(cgroup: Path) -> list[int]:
    """Return the bytes that a cgroup has left; nothing where it has no limit or there is none at this place."""
    try:
        limit, used = (cgroup / "memory.max").read_text().strip(), int((cgroup / "memory.current").read_text())
        counts = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except OSError:
        return []
    return [] if limit == "max" else [int(limit) - used + int(counts.get("inactive_file", 0))]


def footprint(data: int, trailer: int = 0) -> int:
    """Return the bytes that a record takes in a segment."""
    return _ALIGN + _aligned(data) + _aligned(max(trailer, _REASON))


def as_rows(taken: Taken, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    """View a record's data; raise `RoutingError` where its size does not fit."""
    kind = np.dtype(dtype)
    if len(taken.data) != math.prod(shape) * kind.itemsize:
        raise RoutingError(f"a record of {len(taken.data)} bytes cannot be {shape} of {kind}")
    return taken.data.view(kind).reshape(shape)
