"""A fake engine that takes weights bucket by bucket by the real ways, and answers with a sum over their bytes."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from r3.config import Config
from r3.errors import EngineError
from r3.rollout.engine import EngineSpec
from r3.rollout.engines.sglang_weights import _Handle, _payload
from r3.weights import STREAMED, BroadcastGroup, WeightPart
from r3.weightsum import weight_checksum
from tests.fake_engine import FakeEngine


def joined(group: BroadcastGroup, rank: int) -> Any:
    """Join a broadcast group as SGLang's `init_custom_process_group` does."""
    limit = timedelta(seconds=60)
    store = dist.TCPStore(group.host, group.port, group.world, is_master=False, timeout=limit)
    made, _ = distributed_c10d._new_process_group_helper(
        group.world, rank, [], dist.Backend(group.backend), dist.PrefixStore(group.name, store),
        group_name=group.name, timeout=limit,
    )  # fmt: skip
    distributed_c10d._world.pg_group_ranks[made] = {one: one for one in range(group.world)}
    return made


class StreamedFake(FakeEngine):
    """`die_in` may also be `begin_weights`, `load_part`, `end_weights` or `join_group`."""

    def __init__(self, config: Config, model_dir: str | Path, index: int) -> None:
        super().__init__(config, model_dir, index)
        self._groups: dict[str, Any] = {}

    def spec(self) -> EngineSpec:
        spec = super().spec()
        return EngineSpec(
            spec.model, spec.engine, spec.capture, spec.dtype, transports=("object_store", *STREAMED), unverified=""
        )

    def begin_weights(self, version: int) -> None:
        self._fault("begin_weights")
        self._coming, self._sums = version, []

    def load_part(self, part: WeightPart) -> None:
        if part.number:
            self._fault("load_part")
        if part.handles:
            (one,) = part.handles
            flat = pickle.loads(_payload(_Handle(one, part.nbytes), []))["flattened_tensor"]
        else:
            flat = torch.empty(part.nbytes, dtype=torch.uint8)
            dist.broadcast(flat, src=0, group=self._groups[part.group])
        self._sums.append(int(weight_checksum(flat)))

    def end_weights(self, checksums: Sequence[int]) -> None:
        self._fault("end_weights")
        if tuple(self._sums) != tuple(checksums):
            raise EngineError(f"version {self._coming} arrived changed")
        self._version = self._coming

    def join_group(self, group: BroadcastGroup, offset: int) -> None:
        self._fault("join_group")
        self._groups[group.name] = joined(group, offset)

    def leave_group(self, name: str) -> None:
        dist.destroy_process_group(self._groups.pop(name))
