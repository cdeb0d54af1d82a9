"""The order in which a push asks trainer and engines for things, and what a death changes; both sides are stand-ins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from r3.config import Config
from r3.errors import EngineError
from r3.rollout.deaths import WorkerDied
from r3.sync import WeightSync
from r3.weights import BroadcastGroup, SentWeights, Site, WeightPart

BUCKETS = 4


class Sides:
    """Pool, trainer group and outlet in one; `log` has every call in the order in which it takes effect."""

    def __init__(
        self,
        engines: int,
        dies: tuple[str, int] | None = None,
        backend: str = "gloo",
        returned: Sequence[int] = (),
        dead: Sequence[int] = (),
    ) -> None:
        self.log: list[str] = []
        self._backend, self._returned, self._dead = backend, returned, dead
        self.blocked: tuple[int, ...] = ()
        self.abandoned: tuple[int, list[int]] | None = None
        self.version, self.reload, self._dies = 1, None, dies
        self._engines, self._filled = engines, 0

    # The pool.
    def spec(self) -> Any:
        transports = ("object_store", "ipc", "broadcast")
        return SimpleNamespace(ranks=2, transports=transports, unverified="", engine="stand-in")

    def specs(self) -> list[Any]:
        return [self.spec()] * self._engines

    def sites(self) -> list[Site]:
        return [Site("n", (gpu,)) for gpu in "abcd"[: self._engines]]

    def call(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        for worker, given in arguments.items():
            shown = [f"part {one.number}, {len(one.handles)} handles" if isinstance(one, WeightPart) else one
                     for one in given]  # fmt: skip
            shown = [one.name if isinstance(one, BroadcastGroup) else one for one in shown]
            self.log.append(f"{method}({', '.join(map(str, shown))}) on {worker}")
            if self._dies == (method, worker):
                self._dies = None
                raise WorkerDied(worker, RuntimeError("killed"), self._returned, self._dead)
        return dict.fromkeys(arguments, 0.5)

    def replace(self, death: WorkerDied) -> None:
        self.log.append(f"replace {death.worker}")
        self.blocked = death.blocked

    # The trainer.
    def outlet(self) -> Sides:
        return self

    def site(self) -> Site:
        return Site("n", ("a",))

    def open(self, *, shared: bool) -> int:
        self.log.append(f"open, shared {shared}")
        self._filled = 0
        return self.version

    def fill(self, released: int, readers: int) -> Any:
        number = self._filled
        self._filled += 1
        self.log.append(f"fill {number}, {released} released")
        part = WeightPart(number, number == BUCKETS - 1, (), 8, ("handle",) * readers, "group")  # type: ignore[arg-type]
        return SimpleNamespace(wait=lambda: part)

    def send(self) -> Any:
        self.log.append(f"send {self._filled - 1}")
        return SimpleNamespace(wait=lambda: None)

    def close(self) -> SentWeights:
        self.log.append("close")
        return SentWeights(self.version, (7,) * BUCKETS, 80, 0.1, 0.2, 16)

    def abandon(self, handed: int, unread: Sequence[int]) -> None:
        self.log.append("abandon")
        self.abandoned = (handed, list(unread))

    def open_group(self, name: str, world: int) -> BroadcastGroup:
        self.log.append(f"open_group {name} of {world}")
        return BroadcastGroup(name, "host", 1, world, self._backend)  # type: ignore[arg-type]

    def join_group(self) -> Any:
        self.log.append("join_group")
        return SimpleNamespace(wait=lambda: None)

    def close_group(self, *, abort: bool) -> Any:
        self.log.append(f"close_group, abort {abort}")
        return SimpleNamespace(wait=lambda: None)


def sync_of(sides: Sides, events: list[str] | None = None) -> WeightSync:
    config = Config.model_validate({"rollout": {"workers": sides._engines}})
    found = events if events is not None else []
    return WeightSync(config, sides, sides, lambda kind, **facts: found.append(kind))  # type: ignore[arg-type]


def test_the_next_bucket_is_filled_beside_and_a_third_only_behind_the_reading_of_the_first() -> None:
    sides = Sides(engines=1)
    moved = sync_of(sides).push()

    assert sides.log == [
        "open, shared True", "begin_weights(1) on 0", "fill 0, -1 released",
        "fill 1, -1 released", "load_part(part 0, 2 handles) on 0",
        "fill 2, 0 released", "load_part(part 1, 2 handles) on 0",
        "fill 3, 1 released", "load_part(part 2, 2 handles) on 0",
        "load_part(part 3, 2 handles) on 0", "close", f"end_weights({(7,) * BUCKETS}) on 0",
    ]  # fmt: skip
    assert moved["transport/weights_bytes"] == 80
    assert moved["transport/weights_load_s"] == 0.5


def test_each_engine_gets_the_weights_by_its_own_way_and_the_group_ends_with_the_run() -> None:
    sides, events = Sides(engines=3), []  # type: ignore[var-annotated]
    with sync_of(sides, events) as sync:
        sync.push()
        begun = len(sides.log)
        sync.push()

    assert events == ["weights_transport"]
    assert sides.log[:5] == [
        "open_group r3-weights-1 of 5", "join_group", "join_group(r3-weights-1, 1) on 1",
        "join_group(r3-weights-1, 3) on 2", "open, shared True",
    ]  # fmt: skip
    second = sides.log[begun:]
    assert second[0] == "open, shared True", "the group stays"
    first = second.index("send 0")
    assert second[first : first + 5] == [
        "send 0", "fill 1, -1 released",
        *(f"load_part(part 0, {handles} handles) on {worker}" for worker, handles in enumerate((2, 0, 0))),
    ]  # fmt: skip
    assert second[-3:] == [
        "close_group, abort False", "leave_group(r3-weights-1) on 1", "leave_group(r3-weights-1) on 2"
    ]  # fmt: skip


@pytest.mark.parametrize("where", ["join_group", "begin_weights", "load_part", "end_weights"])
def test_a_death_ends_the_stream_before_the_next_one_begins(where: str) -> None:
    sides, events = Sides(engines=3, dies=(where, 2)), []  # type: ignore[var-annotated]
    sync_of(sides, events).push()

    died, begun = sides.log.index("abandon"), sides.log.index("replace 2")
    assert died < begun
    assert "close_group, abort True" in sides.log[:died]
    after = sides.log[begun:]
    assert ("leave_group(r3-weights-1) on 1" in after) == (where != "join_group"), "it never got in"
    assert "leave_group(r3-weights-1) on 2" not in after, "it is gone"
    assert "open_group r3-weights-2 of 5" in after
    assert after[-3:] == [f"end_weights({(7,) * BUCKETS}) on {worker}" for worker in range(3)]
    assert events == ["weights_transport", "weights_interrupted"]


@pytest.mark.parametrize(
    ("backend", "returned", "dead", "blocked"),
    [
        ("gloo", (), (), ()), ("nccl", (), (), (1, 3)), ("nccl", (3,), (), (1,)), ("nccl", (), (1,), (3,)),
        ("gloo", (), (3,), ()),
    ],
)  # fmt: skip
def test_engines_that_a_death_leaves_in_a_broadcast_are_replaced_and_not_asked_to_leave(
    backend: str, returned: tuple[int, ...], dead: tuple[int, ...], blocked: tuple[int, ...]
) -> None:
    sides = Sides(engines=4, dies=("load_part", 2), backend=backend, returned=returned, dead=dead)
    sync_of(sides).push()
    assert sides.blocked == blocked
    after = sides.log[sides.log.index("replace 2") :]
    left = {worker for worker in range(4) if f"leave_group(r3-weights-1) on {worker}" in after}
    assert left == {1, 3} - set(blocked) - set(dead)


@pytest.mark.parametrize("where", ["join_group", "begin_weights", "end_weights"])
def test_nobody_is_blocked_by_a_death_outside_a_broadcast(where: str) -> None:
    sides = Sides(engines=3, dies=(where, 2), backend="nccl")
    sync_of(sides).push()
    assert sides.blocked == ()


def test_a_death_of_an_engine_that_shares_the_gpu_blocks_no_broadcast() -> None:
    sides = Sides(engines=3, dies=("load_part", 0), backend="nccl")
    sync_of(sides).push()
    assert sides.blocked == ()


def test_a_group_that_not_all_joined_is_left_by_those_that_did() -> None:
    sides = Sides(engines=3, dies=("join_group", 2), backend="nccl", returned=(1,))
    sync_of(sides).push()
    after = sides.log[sides.log.index("replace 2") :]
    assert after.index("leave_group(r3-weights-1) on 1") < after.index("open_group r3-weights-2 of 5")
    assert "leave_group(r3-weights-1) on 2" not in after


@pytest.mark.parametrize(
    ("dies", "abandoned"),
    [
        (("begin_weights", 0), (-1, [])), (("load_part", 0), (0, [0, 1])), (("load_part", 2), (0, [])),
        (("end_weights", 0), (BUCKETS - 1, [])),
    ],
)  # fmt: skip
def test_the_trainer_learns_which_handles_nobody_opens(dies: tuple[str, int], abandoned: tuple[int, list[int]]) -> None:
    sides = Sides(engines=3, dies=dies)
    sync_of(sides).push()
    assert sides.abandoned == abandoned


def test_handles_of_every_dead_engine_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = Sides(engines=3, dies=("load_part", 0), dead=(2,))
    monkeypatch.setattr(sides, "sites", lambda: [Site("n", ("a",))] * 3)
    sync_of(sides).push()
    assert sides.abandoned == (0, [0, 1, 4, 5])


def test_every_engine_that_does_not_verify_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sides, events = Sides(engines=3), []  # type: ignore[var-annotated]
    specs = [SimpleNamespace(**vars(sides.spec()) | {"unverified": reason}) for reason in ("", "old", "old")]
    monkeypatch.setattr(sides, "specs", lambda: specs)
    config = Config.model_validate({"rollout": {"workers": 3}})
    WeightSync(config, sides, sides, lambda kind, **facts: events.append((kind, facts)))  # type: ignore[arg-type]
    assert events[1:] == [("weights_unverified", {"workers": [1, 2], "reason": "old"})]


def test_a_replaced_engine_is_reached_alone_and_the_others_rejoin_at_the_next_push() -> None:
    sides = Sides(engines=3)
    sync = sync_of(sides)
    sync.push()
    begun = len(sides.log)
    sides.reload(2)  # type: ignore[misc]  (the push has set it)
    again = sides.log[begun:]
    assert again[:4] == [
        "close_group, abort True", "open_group r3-weights-2 of 3", "join_group", "join_group(r3-weights-2, 1) on 2"
    ]  # fmt: skip
    assert not [call for call in again if call.endswith((" on 0", " on 1"))], "they are busy"

    begun = len(sides.log)
    sync.push()
    assert sides.log[begun : begun + 4] == [
        "leave_group(r3-weights-1) on 1", "close_group, abort False", "leave_group(r3-weights-2) on 2",
        "open_group r3-weights-3 of 5",
    ]  # fmt: skip


def test_no_group_is_left_with_a_wait_for_members_that_are_not_asked_to_leave() -> None:
    sides = Sides(engines=3)
    sync = sync_of(sides)
    sync.push()
    begun = len(sides.log)
    # Two deaths between two pushes; then that of an engine which the group does not hold.
    for worker in (1, 2, 0):
        sides.reload(worker)  # type: ignore[misc]  (the push has set it)
    again = sides.log[begun:]
    assert [call for call in again if call.startswith("close_group")] == ["close_group, abort True"] * 3


def test_a_group_that_cannot_be_left_does_not_fail_a_run_that_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    sides, events = Sides(engines=2), []  # type: ignore[var-annotated]
    with sync_of(sides, events) as sync:
        sync.push()

        def broken(*, abort: bool) -> Any:
            raise EngineError("trainer rank 0 died")

        monkeypatch.setattr(sides, "close_group", broken)
    assert events == ["weights_transport", "weights_group_left_behind"]


def test_a_replaced_engine_gets_no_weights_that_the_others_lack() -> None:
    sides = Sides(engines=1)
    sync_of(sides).push()
    sides.version = 2
    with pytest.raises(EngineError, match="the trainer holds weights 2 and the other engines 1"):
        sides.reload(0)  # type: ignore[misc]
