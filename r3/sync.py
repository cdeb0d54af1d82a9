"""Pushing the trainer's weights to the engines, by the way that fits where they stand.

Through the object store a push is two calls. The other ways never hold a whole copy: trainer rank 0 fills one bucket
after the other on its device; while the engines copy one, by its handles (`ipc`) or out of a broadcast (`broadcast`),
it fills the next, and a third only once every engine rank is done with the first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType

from r3.config import Config
from r3.errors import ConfigError, EngineError
from r3.rollout.deaths import WorkerDied
from r3.rollout.engine import EngineSpec
from r3.rollout.pool import RolloutPool
from r3.trainer.group import TrainerGroup
from r3.trainer.port import Pending
from r3.weights import BroadcastGroup, SentWeights, Transport, WeightPart, choose, everywhere

OnEvent = Callable[..., None]


class WeightSync:
    """Brings weights from the trainer to all engines; a context manager that dissolves the broadcast group."""

    def __init__(self, config: Config, pool: RolloutPool, trainers: TrainerGroup, on_event: OnEvent) -> None:
        """Choose the way to every engine, once, and say which and why; raise `ConfigError` where it cannot be had."""
        self._pool, self._trainers, self._on_event = pool, trainers, on_event
        self._outlet = trainers.outlet()
        self._ranks = pool.spec().ranks
        self._ways = self._chosen(config)
        self._group: BroadcastGroup | None = None
        self._members: tuple[int, ...] = ()
        # Groups that a worker has not left yet, because it was busy when its peer died.
        self._to_leave: dict[int, list[str]] = {}
        self._closing: list[Pending] = []
        # Of the stream: the last bucket that was handed out, while it is read where the handles of each worker begin,
        # and whether it is being broadcast.
        self._handed = -1
        self._reading: dict[int, int] = {}
        self._sending = False
        self._groups_made = 0
        self._pushed: int | None = None

    def __enter__(self) -> WeightSync:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Behind an error the actors are killed, and a peer that is gone would be waited for.
        if kind is not None:
            return
        try:
            self.close()
        except EngineError as failure:
            # The run is done and its results are written; the processes end next.
            self._on_event("weights_group_left_behind", reason=str(failure))

    def close(self) -> None:
        """Let the trainer and the engines leave their broadcast group."""
        self._dissolve(lost=())
        self._leave(range(len(self._ways)))

    def push(self) -> dict[str, float]:
        """Make the trainer's weights those of every engine, and return `transport/weights_*`.

        - `weights_bytes`: of one full set. `weights_gb_per_s`: these / seconds of the whole push / 1e9.
        - `weights_gather_s`: the trainer gathers, casts and packs; `weights_load_s`: the slowest engine takes them in,
          by a broadcast with the wait for it. Both go on side by side, except through the object store.
        - `weights_transfer_s`: the trainer makes handles or broadcasts; through the object store what is left of the
          whole. `weights_extra_bytes`: the most that buckets, and batches of other ranks' shards, held on rank 0.

        An engine that dies on the way is replaced and the push begins again. Raises `EngineError`, also for bytes that
        arrived changed.
        """
        begin = time.perf_counter()
        if self._ways[0] == "object_store":
            return self._through_object_store(begin)
        workers = range(len(self._ways))
        while True:
            try:
                sent, load_s = self._stream(workers)
                break
            except WorkerDied as death:
                self._pool.replace(death)
        self._pushed, self._pool.reload = sent.version, self._reload
        whole_s = time.perf_counter() - begin
        return _metrics(sent.nbytes, sent.gather_s, sent.send_s, load_s, whole_s, sent.extra_bytes)

    def _chosen(self, config: Config) -> tuple[Transport, ...]:
        specs, wanted = self._pool.specs(), config.weights.transport
        spec = min(specs, key=lambda one: len(one.transports))
        takes = spec.transports
        ways: tuple[Transport, ...]
        if wanted == "auto" and takes == ("object_store",):
            ways = everywhere("object_store", config.rollout.workers)
            reason = f"{spec.engine} takes weights in no other way"
        else:
            ways, reason = choose(wanted, self._outlet.site(), self._pool.sites())
        lacking = set(ways) - set(takes)
        if lacking:
            raise ConfigError(
                f"weights.transport={wanted}, but {spec.engine} takes weights by {', '.join(takes)} alone"
            )
        self._on_event("weights_transport", transports=list(ways), reason=reason)
        if config.weights.verify:
            for reason, workers in _unverified(specs).items():
                self._on_event("weights_unverified", workers=workers, reason=reason)
        return ways

    def _through_object_store(self, begin: float) -> dict[str, float]:
        exported = self._trainers.export()
        gathered = time.perf_counter() - begin
        load_s = self._pool.load_weights(exported.ref)
        whole = time.perf_counter() - begin
        return _metrics(exported.nbytes, gathered, max(0.0, whole - gathered - load_s), load_s, whole, exported.nbytes)

    def _stream(self, workers: Sequence[int]) -> tuple[SentWeights, float]:
        """Stream the current weights into some engines; return what was sent and the slowest engine's seconds.

        Where an engine dies, the trainer ends the stream, so that another one can begin.
        """
        self._handed, self._reading, self._sending = -1, {}, False
        try:
            self._gather(workers)
            return self._parts(workers)
        except WorkerDied as death:
            self._on_event("weights_interrupted", worker=death.worker, reason=str(death))
            death.blocked = self._blocked(death)
            begins = [self._reading[worker] for worker in sorted(death.dead) if worker in self._reading]
            unread = [place for begin in begins for place in range(begin, begin + self._ranks)]
            self._dissolve(lost=(*death.dead, *death.blocked), abort=True)
            self._closing.append(self._outlet.close_group(abort=True))
            self._outlet.abandon(self._handed, unread)
            raise

    def _blocked(self, death: WorkerDied) -> tuple[int, ...]:
        """Return the workers that wait in a broadcast for a dead one: gloo lets go of them, NCCL does not."""
        group, members = self._group, set(self._members)
        if not self._sending or group is None or group.backend != "nccl" or not members & death.dead:
            return ()
        return tuple(sorted(members - death.dead - death.returned))

    def _parts(self, workers: Sequence[int]) -> tuple[SentWeights, float]:
        by_handle = [worker for worker in workers if self._ways[worker] == "ipc"]
        readers = len(by_handle) * self._ranks
        version = self._outlet.open(shared=readers > 0)
        self._pool.call("begin_weights", {worker: (version,) for worker in workers})
        part = self._outlet.fill(-1, readers).wait()
        while True:
            sending = self._outlet.send() if self._group else None
            coming = None if part.last else self._outlet.fill(part.number - 1, readers)
            first = {worker: place * self._ranks for place, worker in enumerate(by_handle)}
            self._handed, self._reading, self._sending = part.number, first, sending is not None
            self._pool.call(
                "load_part", {worker: (_share(part, first.get(worker), self._ranks),) for worker in workers}
            )
            self._reading, self._sending = {}, False
            if sending is not None:
                sending.wait()
            if coming is None:
                break
            part = coming.wait()
        sent = self._outlet.close()
        seconds = self._pool.call("end_weights", {worker: (sent.checksums,) for worker in workers})
        return sent, max(map(float, seconds.values()))

    def _gather(self, workers: Sequence[int]) -> None:
        """Make the broadcast group one of rank 0 and those of the workers that are reached by it."""
        members = tuple(worker for worker in workers if self._ways[worker] == "broadcast")
        self._leave(members)
        if members == self._members:
            return
        self._dissolve(lost=())
        self._leave(members)
        if not members:
            return
        self._groups_made += 1
        group = self._outlet.open_group(f"r3-weights-{self._groups_made}", 1 + len(members) * self._ranks)
        joining = self._outlet.join_group()
        places = {worker: (group, 1 + place * self._ranks) for place, worker in enumerate(members)}
        try:
            self._pool.call("join_group", places)
        except WorkerDied as death:
            # With gloo nobody is in before all are; NCCL lets each in at once.
            for worker in death.returned:
                self._to_leave.setdefault(worker, []).append(group.name)
            raise
        joining.wait()
        self._group, self._members = group, members

    def _dissolve(self, lost: Sequence[int], *, abort: bool = False) -> None:
        """Let the trainer leave the group; its other members leave when they are next at hand, except `lost` ones.

        `abort`: without waiting for them, as NCCL otherwise does, because not all of them are asked to leave now.
        """
        group, members = self._group, self._members
        self._group, self._members = None, ()
        for worker in lost:
            self._to_leave.pop(worker, None)
        if group is None:
            return
        for worker in set(members) - set(lost):
            self._to_leave.setdefault(worker, []).append(group.name)
        self._closing.append(self._outlet.close_group(abort=abort or bool(set(members) & set(lost))))

    def _leave(self, workers: Sequence[int]) -> None:
        """Let workers leave the groups of before; NCCL lets nobody go before all do."""
        while leaving := {worker: (self._to_leave[worker].pop(0),) for worker in workers if self._to_leave.get(worker)}:
            self._pool.call("leave_group", leaving)
        closing, self._closing = self._closing, []
        for call in closing:
            call.wait()

    def _reload(self, worker: int) -> None:
        """Give a replaced engine the weights that the others have, which the trainer must still hold."""
        self._dissolve(lost=(worker,), abort=True)
        sent, _ = self._stream((worker,))
        if sent.version != self._pushed:
            raise EngineError(
                f"rollout worker {worker} was replaced, but the trainer holds weights {sent.version} and the other "
                f"engines {self._pushed}"
            )


def _share(part: WeightPart, first: int | None, ranks: int) -> WeightPart:
    """Return the part as one engine needs it: with the handles of its ranks, from `first` on, or with none."""
    return replace(part, handles=() if first is None else part.handles[first : first + ranks])


def _unverified(specs: Sequence[EngineSpec]) -> dict[str, list[int]]:
    """Return why engines do not verify what arrives, and which."""
    found: dict[str, list[int]] = {}
    for worker, spec in enumerate(specs):
        if spec.unverified:
            found.setdefault(spec.unverified, []).append(worker)
    return found


def _metrics(
    nbytes: int, gather_s: float, transfer_s: float, load_s: float, whole_s: float, extra: int
) -> dict[str, float]:
    return {
        "transport/weights_bytes": float(nbytes),
        "transport/weights_gather_s": gather_s,
        "transport/weights_transfer_s": transfer_s,
        "transport/weights_load_s": load_s,
        "transport/weights_gb_per_s": nbytes / whole_s / 1e9,
        "transport/weights_extra_bytes": float(extra),
    }
