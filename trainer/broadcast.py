"""Rank 0's end of the process group over which weights go to engines on other devices."""

from __future__ import annotations

import time
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
        """Wait until every engine rank has joined; raise `EngineError` after `weights.timeout_s`."""
        name = self.facts.name
        try:
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
            work = dist.broadcast(flat, src=0, group=self._group, async_op=True)
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

    def close(self, *, abort: bool) -> None:
        """Leave the group; `abort` where a peer is gone, with which NCCL would wait."""
        group, self._group = self._group, None
        if group is None:
            return
        if abort and self.facts.backend == "nccl":
            distributed_c10d._abort_process_group(group)
        else:
            dist.destroy_process_group(group)
