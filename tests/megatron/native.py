"""Megatron-core's own RouterReplay under the trainer's passes, driven as its users drive it.

Per microbatch and router: `set_target_indices`, action REPLAY_FORWARD, the forward pass, action REPLAY_BACKWARD. It
stands where the trainer has its `ReplayContext`, so that everything else of a pass is the same code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from r3.config import Config
from r3.trainer import build, policy
from r3.trainer.megatron import TopKRouter
from r3.trainer.model import Architecture
from r3.trainer.outcome import Rehearsal
from r3.trainer.policy import Policy, RoutingUse
from r3.trainer.rehearsal import rehearse
from r3.trainer.replay import MicrobatchRouting, router_order
from r3.trainer.tally import Tally
from r3.types import Batch, ModelSpec
from tests.gloo_pool import arranged
from tests.megatron.layouts import laid_out

Ids = list[torch.Tensor]


class NativeReplay:
    """`ReplayContext`'s interface over RouterReplay; `spoil` changes the int64 ids `[tokens, k]` of the layers."""

    def __init__(self, chunks: Sequence[torch.nn.Module], spec: ModelSpec) -> None:
        found = [m for c in chunks for m in c.modules() if isinstance(m, TopKRouter)]
        self._routers = {router.layer_number - 1: router.router_replay for router in found}
        self._of_chunk = [
            [m.layer_number - 1 for m in chunk.modules() if isinstance(m, TopKRouter)] for chunk in chunks
        ]
        self._local = {layer: index for index, layer in enumerate(sorted(self._routers))}
        self.columns = tuple(spec.moe_layers.index(layer) for layer in sorted(self._routers))
        self._spec = spec
        self.spoil: Callable[[Ids], Ids] = lambda ids: ids
        self.peak_bytes, self._tally = 0, self._zero(torch.device("cpu"))
        for replay in self._routers.values():
            replay.get_replay_topk = self._timed(replay)

    def _zero(self, device: torch.device) -> Tally:
        return Tally.zero(self._spec, device)

    @contextmanager
    def measured(self, device: torch.device) -> Iterator[Tally]:
        """Open a pass; its own time is that of the conversion of ids and of `get_replay_topk`."""
        self._tally = self._zero(device)
        yield self._tally

    def run(self, routing: MicrobatchRouting, call: Callable[[], torch.Tensor], chunk: int = 0) -> torch.Tensor:
        """Set the microbatch's ids, run the model, and leave the routers ready for backward."""
        from megatron.core.transformer.moe.router_replay import RouterReplayAction

        layers = self._of_chunk[chunk]
        if routing.experts is None or not routing.force:
            for layer in layers:
                self._routers[layer].clear_router_replay_action()
            return call()
        begin = time.perf_counter()
        # There is no mark for a row without a record, so each needs some ids; the lowest are distinct.
        filler = torch.arange(routing.experts.shape[-1], device=routing.experts.device)
        ids = [
            router_order(torch.where(routing.recorded[..., None], routing.experts[:, :, self._local[layer]], filler))
            for layer in layers
        ]
        for layer, target in zip(layers, self.spoil([one.to(torch.int64) for one in ids]), strict=True):
            self._routers[layer].set_target_indices(target)
            self._routers[layer].set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        self._tally.seconds += time.perf_counter() - begin
        output = call()
        for layer in layers:
            self._routers[layer].set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
        self.peak_bytes = max(self.peak_bytes, self.held_bytes())
        return output

    def _timed(self, replay: Any) -> Callable[..., Any]:
        ask = replay.get_replay_topk

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            found = ask(*args, **kwargs)
            if replay.router_replay_action is not None:
                self._tally.seconds += time.perf_counter() - begin
            return found

        return timed

    def held(self) -> Ids:
        """Every tensor of ids that the routers still hold, each once."""
        every = [t for r in self._routers.values() for t in (*r.replay_backward_list, r.target_topk_idx)]
        return list({id(tensor): tensor for tensor in every if tensor is not None}.values())

    def held_bytes(self) -> int:
        """Bytes of them."""
        return sum(tensor.nbytes for tensor in self.held())

    def clear(self) -> None:
        """What the caller must do behind every pass."""
        for router in self._routers.values():
            router.clear_indices()
            router.clear_router_replay_action()

    def require_empty(self, when: str) -> None:
        """RouterReplay has no such check: what a log-prob pass queued is the next step's first entry."""
        self.clear()


def native_policy(config: Config, directory: Path) -> Policy:
    """A policy whose routers are Megatron-core's, with `moe_enable_routing_replay`; `policy.replay` is NativeReplay."""
    from megatron.core.transformer.moe.router_replay import RouterReplay

    RouterReplay.clear_global_router_replay_instances()
    plain, chunks = build.transformer_config, build.build_chunks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            build, "transformer_config", lambda *a, **k: plain(*a, **(k | {"moe_enable_routing_replay": True}))
        )
        patch.setattr(build, "build_chunks", lambda *a, **k: chunks(*a, **(k | {"replay": False})))
        patch.setattr(policy, "ReplayContext", NativeReplay)
        return Policy(config, Architecture.from_directory(directory), directory, updates=10)


def run_native(config: Config, directory: Path, batch: Batch) -> Rehearsal:
    """`run_layout` with Megatron-core's own replay; collective over the ranks of the pool."""
    with arranged(config.trainer):
        policy = native_policy(config, directory)
        return rehearse(policy, *laid_out(policy, config, batch), RoutingUse(force=True))


Spoiler = Callable[[Ids], Ids]


def _short(ids: Ids) -> Ids:
    return [one[:-8] for one in ids]


def _duplicated(ids: Ids) -> Ids:
    return [torch.cat([one[:, :1], one[:, :1], one[:, 2:]], 1) for one in ids]


def _shifted(ids: Ids) -> Ids:
    return [one.roll(1, 0) for one in ids]


SPOILED: dict[str, Spoiler] = {"short by 8 rows": _short, "an id twice": _duplicated, "shifted by one row": _shifted}
