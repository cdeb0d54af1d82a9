"""Rank 0's end of the process group over which weights go to engines on other devices."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from r3.errors import EngineError
from r3.weights import BroadcastGroup

_POLL_S = 0.0002
# torch's own limit ends the whole process; ours comes first.
_GRACE_S = 120.0
# torch's watchdog ends the process, without an exception in Python, when NCCL says that a peer is gone. It reads this
# for each group when that is made (`ProcessGroupNCCL`), and Megatron-core's groups keep what they have.
_NO_TEARING_DOWN = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}


class SendGroup:
    """A group of this process and engine ranks, made beside torch's default group; open it, `join`, `send`, `close`.

    The engines join with SGLang's `init_weights_update_group` (`sglang.srt.utils.init_custom_process_group`, 0.5.17 and
    0.5.23), whose way to the store this follows.
    """

    def __init__(self, name: str, world: int, host: str, timeout_s: float, device: torch.device) -> None:
        """Open the rendezvous on a free port, by which engines reach it under `host`."""
        self._limit = timeout_s
        self._store = dist.TCPStore(
            host, 0, world, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )
        backend: Literal["nccl", "gloo"] = "nccl" if device.type == "cuda" else "gloo"
        self.facts = BroadcastGroup(name, host, self._store.port, world, backend)
        self._group: Any = None

    def join(self) -> None:
        """Join; gloo waits for every engine rank, NCCL does so in the first `send`.

        Raises `EngineError` after `weights.timeout_s`. SGLang makes no collective when it joins that one here could
        meet, so NCCL cannot connect before there is a bucket.
        """
        name = self.facts.name
        try:
            with _environment(_NO_TEARING_DOWN):
                self._group, _ = distributed_c10d._new_process_group_helper(
                    self.facts.world,
                    0,
                    [],
                    dist.Backend(self.facts.backend),
                    dist.PrefixStore(name, self._store),
                    group_name=name,
                    timeout=timedelta(seconds=self._limit + _GRACE_S if self.facts.backend == "nccl" else self._limit),
                )
        except (RuntimeError, ValueError) as error:
            raise EngineError(
                f"not all {self.facts.world - 1} engine ranks joined the weight group {name} within {self._limit:g} s "
                f"(weights.timeout_s): {error}"
            ) from error
        distributed_c10d._world.pg_group_ranks[self._group] = {rank: rank for rank in range(self.facts.world)}

    def send(self, flat: torch.Tensor) -> None:
        """Broadcast bytes `[n]` and wait until they are on their way out of `flat`.

        Raises `EngineError` where a peer is gone or does not take them within `weights.timeout_s`.
        """
        deadline = time.monotonic() + self._limit
        try:
            work = self._begun(flat)
            while not work.is_completed():
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"the engines did not take a bucket of {len(flat) / 2**20:.0f} MiB within {self._limit:g} s "
                        "(weights.timeout_s)"
                    )
                time.sleep(_POLL_S)
            work.wait()
        except RuntimeError as error:
            raise EngineError(f"the broadcast of weights failed: {error}") from error

    def _begun(self, flat: torch.Tensor) -> Any:
        """Begin a broadcast. NCCL connects in there, without a limit of its own, so it has a thread of its own."""
        group = self._group

        def begin() -> Any:
            # Which device a thread is on is its own affair.
            with torch.cuda.device_of(flat):
                return dist.broadcast(flat, src=0, group=group, async_op=True)

        if self.facts.backend == "gloo":
            return begin()
        try:
            return within(self._limit, begin)
        except TimeoutError:
            raise EngineError(
                f"not all {self.facts.world - 1} engine ranks met the broadcast of weights in the group "
                f"{self.facts.name} within {self._limit:g} s (weights.timeout_s)"
            ) from None

    def close(self, *, abort: bool) -> None:
        """Leave the group; `abort` where a peer is gone, with which NCCL would wait."""
        group, self._group = self._group, None
        if group is None:
            return
        if abort and self.facts.backend == "nccl":
            distributed_c10d._abort_process_group(group)
        else:
            dist.destroy_process_group(group)


def within(limit_s: float, function: Callable[[], Any]) -> Any:
    """Return what `function` returns or raises; raise `TimeoutError` after `limit_s`.

    The thread in which it runs then stays where it hangs, with all that it holds, until the process ends: nothing ends
    a call into NCCL that waits for its peers (`ncclCommInitRank`), before which there is nothing to abort.
    """
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except Exception as error:  # noqa: BLE001 (raised where the outcome is waited for)
            outcome.set_exception(error)

    threading.Thread(target=run, name="r3-broadcast", daemon=True).start()
    return outcome.result(limit_s)


@contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    """Set variables that are not set, as long as it takes to make a group."""
    added = [key for key in wanted if key not in os.environ]
    os.environ.update({key: wanted[key] for key in added})
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]
