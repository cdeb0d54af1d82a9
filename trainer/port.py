"""The driver's handle on the trainer ranks as senders of weights; no torch here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from r3.errors import EngineError, R3Error
from r3.weights import BroadcastGroup, SentWeights, Site


class Pending:
    """A call of rank 0 that goes on; `wait` returns its value or raises what went wrong."""

    def __init__(self, call: ray.ObjectRef, what: str, limit_s: float) -> None:
        self._call, self._what = call, what
        self._limit_s, self._deadline = limit_s, time.monotonic() + limit_s

    def wait(self) -> Any:
        """Wait for the value; raise `EngineError`, also where the rank died or exceeds `trainer.timeout_s`."""
        try:
            return ray.get(self._call, timeout=max(0.0, self._deadline - time.monotonic()))
        except GetTimeoutError:
            raise EngineError(
                f"trainer rank 0 did not finish {self._what!r} within {self._limit_s:g} s (trainer.timeout_s)"
            ) from None
        except RayActorError as error:
            raise EngineError(f"trainer rank 0 died in {self._what!r}: {error}") from error
        except RayTaskError as error:
            if isinstance(error.cause, R3Error):
                raise error.cause from error
            raise EngineError(f"trainer rank 0 failed in {self._what!r}: {error}") from error


class OutletPort:
    """`WeightOutlet` of every rank: one stream at a time, read by the caller bucket by bucket."""

    def __init__(
        self,
        ranks: Sequence[ActorHandle],
        timeout_s: float,
        root_cause: Callable[[Mapping[int, Exception], str], R3Error],
    ) -> None:
        self._ranks, self._timeout, self._root_cause = ranks, timeout_s, root_cause
        self._senders: list[ray.ObjectRef] = []

    def site(self) -> Site:
        """Return where rank 0 stands, with its own GPU alone."""
        site: Site = Pending(self._ranks[0].site.remote(), "site", self._timeout).wait()
        return site

    def open(self, *, shared: bool) -> int:
        """Begin a stream of the current weights and return their version; the other ranks begin to send their parts."""
        opened = self._ask("open", shared)
        self._senders = [rank.weights.remote("send_parts") for rank in self._ranks[1:]]
        return int(opened.wait())

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
        return Pending(self._ranks[0].weights.remote(method, *arguments), method, self._timeout)

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
                raise self._root_cause({rank: error}, "send_parts") from error
