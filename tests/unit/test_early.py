"""Rows that are looked at while the engine still generates: what is said of them, and of which nothing is."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from r3.errors import RoutingError
from r3.rollout import early
from r3.rollout.early import EarlyLook
from r3.rollout.engines.sglang_returned import read_returned
from r3.rollout.segment import Owner, Ticket, Writer
from r3.routing import RoutingTrace, RowsSeen, rows_checksum, see_rows
from r3.types import ModelSpec
from tests.unit.strategies import distinct_experts

MODEL = ModelSpec("qwen3_moe", 4, (0, 1, 2, 3), 16, 3, 8, 100)

TOKENS = np.arange(40, dtype=np.int32)
LAYERS, K, EXPERTS = MODEL.num_layers, MODEL.top_k, MODEL.num_experts


def rows(seed: int, count: int = 39) -> np.ndarray:
    return distinct_experts(np.random.default_rng(seed), count, LAYERS, K, EXPERTS).astype(np.uint8)


def looked(data: np.ndarray) -> RowsSeen:
    seen = see_rows(data, EXPERTS)
    assert seen is not None
    return seen


def put(writer: Writer, data: np.ndarray) -> Ticket:
    slot = writer.allocate(data.nbytes)
    assert slot is not None
    slot.data[:] = data.reshape(-1)
    slot.publish()
    return slot.ticket


def pair() -> tuple[Owner, Writer]:
    owner = Owner(1 << 16)
    return owner, Writer(owner.path)


def wait_for(condition: object, within_s: float = 20) -> None:
    assert callable(condition)
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_sound_rows_are_known_by_their_checksum_and_nothing_is_said_of_others() -> None:
    owner, writer = pair()
    repeated, outside = rows(1), rows(2)
    repeated[5, 1, 0] = repeated[5, 1, 1]
    outside[7, 0, 0] = EXPERTS
    with EarlyLook(owner, MODEL) as sound:
        tickets = [put(writer, one) for one in (rows(0), repeated, outside, rows(0).reshape(-1)[:-1], rows(3))]
        wait_for(lambda: len(sound) == 2)
    assert {ticket: seen.crc32 for ticket, seen in sound.items()} == {
        tickets[0]: rows_checksum(rows(0)), tickets[4]: rows_checksum(rows(3)),
    }  # fmt: skip


def test_what_was_not_looked_at_in_time_is_left_alone() -> None:
    owner, writer = pair()
    with EarlyLook(owner, MODEL) as sound:
        pass
    put(writer, rows(0))
    assert not sound


def test_an_error_of_looking_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(experts: np.ndarray, num_experts: int) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(early, "see_rows", broken)
    owner, writer = pair()
    put(writer, rows(0))
    look = EarlyLook(owner, MODEL)
    with pytest.raises(MemoryError, match="no room"), look:
        wait_for(look._running.done)


def test_a_record_read_behind_a_look_is_the_one_read_without() -> None:
    who = {"request": 0, "weight_version": 3, "engine": "sglang", "start": 0}
    owner, writer = pair()
    found: list[RoutingTrace] = []
    for looks in (True, False):
        ticket = put(writer, rows(4))
        sound = {ticket: looked(rows(4))} if looks else {}
        read, _ = read_returned(owner, (ticket, 0, 39), TOKENS, MODEL, **who, sound=sound)
        found.append(read.routing)
    assert found[0].crc32 == found[1].crc32
    np.testing.assert_array_equal(found[0].experts, found[1].experts)
    found[0].verify(TOKENS)
    assert replace(found[0], experts=found[1].experts) == found[1]


def test_a_look_stands_for_the_ids_alone() -> None:
    """Rows that do not react to their tokens, or are too few, are found whatever was seen before."""
    who = {"request": 0, "weight_version": 3, "engine": "sglang", "start": 0}
    owner, writer = pair()
    same = np.repeat(rows(5, 1), 39, axis=0)
    for data, count, message in (
        (same, 39, "identical in all"),
        (rows(6, 38), 38, "38 rows from position 0"),
    ):
        ticket = put(writer, data)
        with pytest.raises(RoutingError, match=message):
            read_returned(owner, (ticket, 0, count), TOKENS, MODEL, **who, sound={ticket: looked(data)})
