"""The owner of the memory in which rows come back: whose it is, when it is free again, and what becomes of it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from r3.errors import RoutingError
from r3.rollout.segment import Owner, Slot, Ticket, Writer, as_rows, available_memory, footprint

SIZE = 4096


def pair(size: int = SIZE) -> tuple[Owner, Writer]:
    owner = Owner(size)
    return owner, Writer(owner.path)


def put(writer: Writer, fill: int, size: int = 100, trailer: bytes = b"") -> Slot:
    slot = writer.allocate(size)
    assert slot is not None
    slot.data[:] = fill
    slot.publish(trailer)
    return slot


def fits(writer: Writer, size: int) -> bool:
    return writer.allocate(size, 0) is not None


def test_a_record_arrives_as_a_read_only_view() -> None:
    owner, writer = pair()
    slot = put(writer, 7, 24, b"beside")
    taken = owner.take(slot.ticket, 1)

    assert (taken.data.tolist(), taken.trailer) == ([7] * 24, b"beside")
    assert not taken.data.flags.owndata
    assert not taken.data.flags.writeable
    assert as_rows(taken, np.uint16, (3, 2, 2)).tolist() == [[[1799, 1799]] * 2] * 3
    with pytest.raises(RoutingError, match=r"24 bytes cannot be \(5, 2, 2\) of uint16"):
        as_rows(taken, np.uint16, (5, 2, 2))


def test_a_place_is_free_when_the_last_view_of_it_is_gone() -> None:
    owner, writer = pair(footprint(2000) + 64)
    view = as_rows(owner.take(put(writer, 1, 2000).ticket, 1), np.uint8, (20, 10, 10))[3:5]
    gc.collect()
    assert not fits(writer, 2000), "the place was taken back under a view"
    assert view.tolist() == [[[1] * 10] * 10] * 2
    del view
    gc.collect()
    assert fits(writer, 2000)


def test_what_is_abandoned_is_free_and_what_was_taken_is_not() -> None:
    owner, writer = pair(2 * footprint(800) + 64)
    kept = owner.take(put(writer, 1, 800).ticket, 1)
    unread = put(writer, 2, 800)
    owner.abandon()
    assert not fits(writer, 800), "records are taken back in order, and the first is in use"
    del kept
    gc.collect()
    put(writer, 3, 800)
    put(writer, 4, 800)
    with pytest.raises(RoutingError, match="record 2 was given up before it was read"):
        owner.take(unread.ticket, 0)


def test_a_record_under_way_survives_that_its_reader_gave_up() -> None:
    owner, writer = pair(footprint(800) + 64)
    slot = writer.allocate(800)
    assert slot is not None
    owner.abandon()
    assert not fits(writer, 800), "its writer still fills it"
    slot.publish()
    assert fits(writer, 800)


def test_bytes_are_bounded_and_reused_in_a_ring() -> None:
    owner, writer = pair()
    sizes = np.random.default_rng(0).integers(0, 900, 4000)
    held: list[tuple[np.ndarray, int]] = []
    full = 0
    for number, size in enumerate(sizes.tolist()):
        slot = writer.allocate(size, 16)
        while slot is None:
            full += 1
            held.pop(0)
            slot = writer.allocate(size, 16)
        slot.data[:] = number % 251
        slot.publish(bytes([number % 256]))
        taken = owner.take(slot.ticket, 1)
        assert taken.trailer == bytes([number % 256])
        held.append((taken.data, number % 251))
        for data, value in held:
            assert (data == value).all()
    assert full > 1000
    assert owner.size == SIZE
    assert writer.allocate(SIZE) is None


def test_a_record_is_read_once_and_waited_for() -> None:
    owner, writer = pair()
    slot = writer.allocate(8)
    assert slot is not None
    with pytest.raises(RoutingError, match="was not written within 0 s"):
        owner.take(slot.ticket, 0)
    slot.publish()
    taken = owner.take(slot.ticket, 0)
    with pytest.raises(RoutingError, match="was read already"):
        owner.take(slot.ticket, 0)
    with pytest.raises(RoutingError, match="record 9 was given up before it was read; 1 is in its place"):
        owner.take(Ticket(9, slot.ticket.offset), 0)
    del taken


def test_a_writer_that_cannot_write_says_why() -> None:
    owner, writer = pair()
    slot = writer.allocate(8, 16)
    assert slot is not None
    slot.publish(bytes(300))
    with pytest.raises(RoutingError, match="not return its routing: 300 bytes beside the rows have no room in 256"):
        owner.take(slot.ticket, 0)
    assert fits(writer, 8)


def test_a_foreign_file_is_no_segment(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(bytes(4096))
    with pytest.raises(RoutingError, match="no segment of routing records"):
        Writer(str(tmp_path / "other"))


def test_memory_that_the_host_does_not_have_is_never_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", lambda *arguments: pytest.fail("the host would end other processes"))
    with pytest.raises(OSError, match="MiB are more than half of the"):
        Owner(1 << 50, prefault=True)


def cgroup(folder: Path, limit: str, used: int = 0, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - cached}\ninactive_file {cached}\n")


@pytest.mark.parametrize(
    ("own", "parent", "available"),
    [
        (("max",), ("max",), 8192),
        (("5000", 2000), ("max",), 3000),
        (("5000", 4500, 4000), ("max",), 4500),
        (("5000", 1000), ("6000", 5900), 100),
        (("5000", 6000), ("max",), 0),
        (("9000000", 1000), ("max",), 8192),
    ],
)
def test_memory_is_what_the_host_has_or_what_a_group_of_processes_may_still_take(
    tmp_path: Path, own: tuple[str, int], parent: tuple[str, int], available: int
) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:  8 kB\n")
    (proc / "self" / "cgroup").write_text("4:memory:/old\n0::/pods/one\n")
    cgroup(groups / "pods" / "one", *own)
    cgroup(groups / "pods", *parent)
    assert available_memory(proc, groups) == available
    (proc / "self" / "cgroup").unlink()
    assert available_memory(proc, groups) == 8192


def test_a_segment_has_one_writer() -> None:
    owner, writer = pair()
    put(writer, 1)
    with pytest.raises(RoutingError, match="has had a writer"):
        Writer(owner.path)


def test_memory_is_taken_as_it_is_used_and_used_again() -> None:
    owner = Owner(256 << 20)
    writer = Writer(owner.path)
    writer.touch()
    for _ in range(200):
        put(writer, 1, 100_000)
        owner.abandon()
    held = 512 * os.stat(owner.path).st_blocks
    assert held < 1 << 20, f"{held} bytes are held by a segment with one record of 100 kB at a time"


def shared_kib() -> int:
    return next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "Shmem:" in line)


CHILD = """
import os, sys
from r3.rollout.segment import Owner, Writer
owner = Owner(64 << 20, prefault=True)
writer = Writer(owner.path)
writer.touch()
print(os.path.realpath(owner.path), flush=True)
sys.stdin.read()
"""


def test_nothing_is_left_of_a_process_that_was_killed() -> None:
    before = set(os.listdir("/dev/shm"))
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    name = child.stdout.readline()
    assert "memfd:r3-routing" in name, "a file with a name could outlive its process"
    held = shared_kib()
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert held - shared_kib() > 32 << 10
    assert set(os.listdir("/dev/shm")) <= before | {name for name in os.listdir("/dev/shm") if "r3" not in name}


def test_the_segment_outlives_its_owner_while_views_do() -> None:
    owner, writer = pair()
    data = owner.take(put(writer, 5, 64).ticket, 1).data
    owner.close()
    owner.close()
    del owner
    gc.collect()
    assert data.tolist() == [5] * 64


def test_looking_ahead_goes_on_where_records_are_not_written_yet() -> None:
    owner, writer = pair()
    first, second, third, fourth = (writer.allocate(8) for _ in range(4))
    assert first is not None
    assert second is not None
    assert third is not None
    assert fourth is not None
    assert list(owner.look_ahead()) == []
    for slot, fill in ((first, 1), (third, 3)):
        slot.data[:] = fill
        slot.publish()
    assert [(ticket, data.tolist()) for ticket, data in owner.look_ahead()] == [(first.ticket, [1] * 8)]
    second.fail("no rows")
    fourth.data[:] = 4
    fourth.publish()
    owner.take(fourth.ticket, 1)
    assert [ticket for ticket, _ in owner.look_ahead()] == [third.ticket], "neither a failed one nor one that was taken"
    assert owner.take(first.ticket, 1).data.tolist() == [1] * 8, "nothing was taken"
    assert list(owner.look_ahead()) == []


def test_looking_ahead_follows_the_ring_round_and_round() -> None:
    rng = np.random.default_rng(0)
    owner, writer = pair()
    wrapped, live = 0, []
    for number in range(1, 400):
        size = int(rng.integers(1, 900))
        while (slot := writer.allocate(size)) is None:
            del live[0]
            gc.collect(0)
        wrapped += bool(live) and slot.ticket.offset < live[-1][0].offset
        slot.data[:] = number % 251
        slot.publish()
        (found,) = owner.look_ahead()
        assert found[0] == slot.ticket
        assert found[1].tolist() == [number % 251] * size
        del found
        live.append((slot.ticket, owner.take(slot.ticket, 1).data))
    assert wrapped > 20


def test_looking_ahead_begins_behind_what_was_given_up() -> None:
    owner, writer = pair()
    owner.abandon()
    for fill in range(5):
        put(writer, fill)
    owner.abandon()
    put(writer, 7, 4)
    assert [data.tolist() for _, data in owner.look_ahead()] == [[7] * 4]
    for fill in range(40):  # over their places
        put(writer, fill)
        owner.abandon()
    put(writer, 9, 4)
    assert [data.tolist() for _, data in owner.look_ahead()] == [[9] * 4]
