"""Waiting for room in a Ray cluster: in short turns, between which a signal is heard, and not beyond its limit."""

from __future__ import annotations

import pytest

from r3 import cluster


class Place:
    """Stands for a placement group that has room from turn `turns` on; a turn takes its whole time."""

    def __init__(self, turns: int, clock: list[float], signalled: int = -1) -> None:
        self.turns, self.clock, self.signalled, self.asked = turns, clock, signalled, list[float]()

    def wait(self, seconds: float) -> bool:
        if len(self.asked) == self.signalled:
            raise KeyboardInterrupt
        self.asked.append(seconds)
        self.clock[0] += seconds
        return len(self.asked) >= self.turns


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(cluster.time, "monotonic", lambda: now[0])
    return now


def test_room_that_comes_is_taken(clock: list[float]) -> None:
    place = Place(3, clock)
    assert cluster._has_room(place, 600)
    assert place.asked == [1, 1, 1]


def test_the_limit_is_kept(clock: list[float]) -> None:
    place = Place(100, clock)
    assert not cluster._has_room(place, 2.5)
    assert place.asked == [1, 1, 0.5]


def test_a_signal_ends_the_wait_behind_a_turn(clock: list[float]) -> None:
    place = Place(100, clock, signalled=2)
    with pytest.raises(KeyboardInterrupt):
        cluster._has_room(place, 600)
    assert place.asked == [1, 1]
