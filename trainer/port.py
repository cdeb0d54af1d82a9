"""The driver's handle on the trainer ranks as senders of weights; no torch here."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from r3.errors import EngineError, R3Error
from r3.weights import BroadcastGroup, SentWeights, Site

# How long the other ranks' errors are waited for once one rank has failed, to tell the cause from its consequences.
_SETTLE_S = 2.0


class Pending:
    """A call of rank 0 that goes on; `wait` returns its value or raises what went wrong.

    `senders`: calls of other ranks, from rank 1 on, on which it depends. One that fails ends the wait: over NCCL rank 0
    does not notice that a peer is gone before its time limit.
    """

    def __init__(self, call: ray.ObjectRef, what: str, limit_s: float, senders: Sequence[ray.ObjectRef] = ()) -> None:
        self._calls, self._what = {one: rank for rank, one in enumerate((call, *senders))}, what
        self._limit_s, self._deadline = limit_s, time.monotonic() + limit_s

    def wait(self) -> Any:
        """Wait for the value; raise `EngineError`, also where a rank died or rank 0 exceeds `trainer.timeout_s`."""
        while True:
            left = max(0.0, self._deadline - time.monotonic())
            done, _ = ray.wait(list(self._calls), num_returns=1, timeout=left)
            if not done:
                raise EngineError(
                    f"trainer rank 0 did not finish {self._what!r} within {self._limit_s:g} s (trainer.timeout_s)"
                )
            rank = self._calls.pop(done[0])
            try:
                value = ray.get(done[0])
            except (RayTaskError, RayActorError) as error:
                raise root_cause({rank: error} | failures(self._calls), self._what) from error
            if rank == 0:
                return value


class OutletPort:
    """`WeightOutlet` of every rank: one stream at a time, read by the caller bucket by bucket."""

    def __init__(self, ranks: Sequence[ActorHandle], timeout_s: float) -> None:
        self._ranks, self._timeout = ranks, timeout_s
        self._senders: list[ray.ObjectRef] = []

    def site(self) -> Site:
        """Return where rank 0 stands, with its own GPU alone."""
        site: Site = Pending(self._ranks[0].site.remote(), "site", self._timeout).wait()
        return site

    def open(self, *, shared: bool) -> int:
        """Begin a stream of the current weights and return their version; the other ranks begin to send their parts."""
        self._senders = [rank.weights.remote("send_parts") for rank in self._ranks[1:]]
        return int(self._ask("open", shared).wait())

    def fill(self, released: int, readers: int) -> Pending:
        """Fill the next bucket once those up to `released` have been read by everyone; its value is a `WeightPart`."""
        return self._ask("fill", released, readers)

    def send(self) -> Pending:
        """Broadcast the bucket that was filled last."""
        return self._ask("send")

    def close(self) -> SentWeights:
        """End the stream behind its last bucket."""
        sent: SentWeights = self._ask("close").wait()
        self._settle()
        return sent

    def abandon(self, handed: int, unread: Sequence[int]) -> None:
        """End a stream half-way; its remaining tensors are gathered and dropped, so that all ranks stand alike.

        `handed`: number of the last bucket that was handed out; `unread`: its readers, by place, that never will be
        done with it.
        """
        self._ask("abandon", handed, tuple(unread)).wait()
        self._settle()

    def open_group(self, name: str, world: int) -> BroadcastGroup:
        """Open the rendezvous of a broadcast group; wait for `join_group` beside the engines' own joining."""
        group: BroadcastGroup = self._ask("open_group", name, world, self._address()).wait()
        return group

    def join_group(self) -> Pending:
        """Join the group that was opened."""
        return self._ask("join_group")

    def close_group(self, *, abort: bool) -> Pending:
        """Leave the group; `abort` where a member is gone."""
        return self._ask("close_group", abort)

    def _address(self) -> str:
        return str(Pending(self._ranks[0].address.remote(), "address", self._timeout).wait())

    def _ask(self, method: str, *arguments: Any) -> Pending:
        return Pending(self._ranks[0].weights.remote(method, *arguments), method, self._timeout, self._senders)

    def _settle(self) -> None:
        """Wait until the other ranks have sent everything."""
        senders, self._senders = self._senders, []
        deadline = time.monotonic() + self._timeout
        for rank, sender in enumerate(senders, start=1):
            try:
                ray.get(sender, timeout=max(0.0, deadline - time.monotonic()))
            except GetTimeoutError:
                raise EngineError(
                    f"trainer rank {rank} did not send its weights within {self._timeout:g} s (trainer.timeout_s)"
                ) from None
            except (RayTaskError, RayActorError) as error:
                raise root_cause({rank: error}, "send_parts") from error


def failures(pending: Mapping[ray.ObjectRef, int]) -> dict[int, Exception]:
    """Return the errors of the other ranks, as far as they come within the moment that a broken connection needs."""
    done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=_SETTLE_S) if pending else ([], [])
    found: dict[int, Exception] = {}
    for call in done:
        try:
            ray.get(call)
        except (RayTaskError, RayActorError) as error:
            found[pending[call]] = error
    return found


def root_cause(errors: Mapping[int, Exception], what: str) -> R3Error:
    """Pick the error to report: a death before a rank's own error before the failures that a lost peer brings about."""
    for rank, error in errors.items():
        if isinstance(error, RayActorError):
            return EngineError(f"trainer rank {rank} died in {what!r}: {error}")
    for error in errors.values():
        if isinstance(error, RayTaskError) and isinstance(error.cause, R3Error):
            return error.cause
    rank, error = next(iter(errors.items()))
    return EngineError(f"trainer rank {rank} failed in {what!r}: {error}")
