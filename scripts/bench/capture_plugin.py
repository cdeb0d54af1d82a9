"""A plugin for `scripts/bench/capture.py` alone: one engine that can capture and return routing in several ways.

Ways are switched at run time, while the engine is idle, each with decode graphs of its own: `off` (no capturer, no copy
of ids in a graph), `stock` (SGLang's own code throughout, a copy for every layer), `ours` (the plugin `r3_provenance`
as it ships, one copy a pass), `tee` (both, from the same passes: every layer's ids are copied to SGLang's buffer, and
once a pass to a second one). `tee` gives SGLang's own rows a copy of its buffer, as 0.5.23 does; `tee_raw` leaves them
what 0.5.17 hands on, a view of the buffer that the next pass writes.

It also holds the scheduler back until all requests of a run wait: which of them had arrived when a pass was formed
would otherwise be chance, and every later pass would follow from it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from r3.rollout.sglang_plugin import hooks as product
from r3.rollout.sglang_plugin.ledger import Ledger
from r3.rollout.sglang_plugin.plugin import POINTS, Point, unfit
from r3.rollout.sglang_plugin.rows import RowStore, narrowed

_WAY, _FLAT = "bench_way", "bench_flat"
_TEES = ("tee", "tee_raw")
_GRAPHS = {"tee_raw": "tee"}  # which way's graphs another way runs
_EXTRA = (
    Point("sglang.srt.state_capturer.base.TopkCaptureOutput.map_device_tensors", "map_tensors", ("self", "fn")),
    Point("sglang.srt.managers.scheduler.Scheduler.get_new_batch_prefill", "plan_prefill", ("self", "running_batch")),
)


class Ways(product.Hooks):
    """The plugin's hooks, which can be taken out of the way; keeps SGLang's own buffer beside its own."""

    def __init__(self) -> None:
        super().__init__(Ledger())
        self.way = "stock"
        self.ours: RowStore | None = None
        self.cache: Any = None
        self.twin: Any = None  # of SGLang's device buffer, for a tee
        self.passes: list[tuple[float, int]] = []
        self.awaited = self.queued = 0
        self.released: float | None = None
        self.runners: dict[str, Any] = {}
        self.capturer: Any = None
        self.ways_returns: Any = None

    def make_host_cache(self, original: Callable[..., Any], cache: Any, *args: Any, **kw: Any) -> Any:
        """Make both kinds of rows; SGLang's own on every rank, ours where answers are sent."""
        original(cache, *args, **kw)
        self.cache = cache
        self._is_mute = not product._answers()
        slots = 0 if self._is_mute else cache.num_tokens
        self.ours = RowStore(slots, cache.num_layers, cache.topk_size, self._num_experts or 0)
        self._store = None if self._is_mute else self.ours

    def capture(self, original: Callable[..., Any], cache: Any, layer_id: int, topk_indices: Any) -> None:
        """Copy a layer's ids as SGLang does, as the plugin does, or as both do."""
        if self.way == "ours":
            super().capture(original, cache, layer_id, topk_indices)
            return
        original(cache, layer_id, topk_indices)
        if self.way in _TEES and cache.name == self.twin.name:
            super().capture(_put, self.twin, layer_id, topk_indices)

    def on_forward_end(self, original: Callable[..., Any], capturer: Any, *args: Any, **kw: Any) -> Any:
        """Leave the pass to SGLang, to the plugin, or to both."""
        self._one_copy.end_pass()
        if self.way == "stock" or (self._is_mute and self.way in _TEES):
            return original(capturer, *args, **kw)
        if self.way == "ours":
            pending = super().on_forward_end(original, capturer, *args, **kw)
        else:
            assert self.ours is not None
            at_once = not kw.get("no_copy_to_cpu", False)
            pending = original(capturer, *args, **(kw | {"no_copy_to_cpu": True}))
            ids = self.twin.buffer[: len(pending.topk), :, : pending.topk.shape[2]]
            setattr(pending, _FLAT, narrowed(ids, self.ours.num_experts))
            if self.way == "tee":
                pending.topk = pending.topk.clone()
            setattr(pending, product._JOBS, self._returns.submitted if self._returns else 0)
            setattr(pending, product._FORWARD, self._ledger.begin_forward())
            setattr(pending, _WAY, self.way)
            if at_once:
                pending.map_device_tensors(lambda tensor: tensor.cpu())
                pending.finalize()
                return None
        if pending is not None:
            setattr(pending, _WAY, self.way)
        return pending

    def map_tensors(self, original: Callable[..., Any], pending: Any, fn: Callable[..., Any]) -> None:
        """Copy the narrow ids beside SGLang's."""
        original(pending, fn)
        if hasattr(pending, _FLAT):
            setattr(pending, _FLAT, fn(getattr(pending, _FLAT)))

    def finalize(self, original: Callable[..., Any], pending: Any) -> None:
        """Store a pass in the way in which it was captured, whatever the way is by now."""
        way = getattr(pending, _WAY, "stock")
        if way == "stock":
            original(pending)
            return
        if way == "ours":
            setattr(self.cache, product._STORE, self.ours)
            super().finalize(original, pending)
            self._show()
            return
        assert self.ours is not None
        if self._returns is not None:
            self._returns.settle(getattr(pending, product._JOBS))
        original(pending)
        slots = pending.out_cache_loc.numpy()
        self.ours.put(slots, getattr(pending, _FLAT).numpy())
        self._ledger.stamp(slots, getattr(pending, product._FORWARD), pending.host_cache.num_tokens)

    def get_topk(self, original: Callable[..., Any], capturer: Any, *args: Any, **kw: Any) -> Any:
        """Gather in the way of the moment; a tee gathers both."""
        if self.way == "stock" or self._is_mute:
            return original(capturer, *args, **kw)
        if self.way == "ours":
            return super().get_topk(original, capturer, *args, **kw)
        setattr(self.cache, product._STORE, self.ours)
        try:
            super().get_topk(original, capturer, *args, **kw)
        finally:
            delattr(self.cache, product._STORE)
        return original(capturer, *args, **kw)

    def collect(self, original: Callable[..., Any], processor: Any, request: Any) -> Any:
        """Collect as SGLang does, or with the plugin."""
        return (
            original(processor, request)
            if self.way in ("stock", "off")
            else super().collect(original, processor, request)
        )

    def run_batch(self, original: Callable[..., Any], scheduler: Any, *args: Any, **kw: Any) -> Any:
        """Number passes in the plugin's own way only."""
        if not self._seen_scheduler:
            self.look_at(scheduler)
        if self.way in ("stock", "off"):
            return original(scheduler, *args, **kw)
        return super().run_batch(original, scheduler, *args, **kw)

    def hold(self, requests: int) -> None:
        """Plan no prompts until so many requests wait; 0 lets go of a hold that nothing else has ended."""
        self.awaited = requests
        if requests:
            self.queued, self.released = 0, None

    def plan_prefill(self, original: Callable[..., Any], scheduler: Any, running_batch: Any) -> Any:
        """Plan nothing while a hold waits for requests; note when the last of them had come.

        The decision is made of the number in the queue alone, which all ranks of a tensor parallel group have in
        common; a clock of each would let them go apart.
        """
        if self.awaited:
            self.queued = len(scheduler.waiting_queue)
            if self.queued < self.awaited:
                from sglang.srt.managers.schedule_batch import NextBatchPlan

                return NextBatchPlan(batch_to_run=None, running_batch=running_batch)
            self.awaited, self.released = 0, time.perf_counter()
        return original(scheduler, running_batch)

    def process_result(self, original: Callable[..., Any], processor: Any, batch: Any, result: Any) -> Any:
        """Note when the result of a pass was taken, and for how many requests."""
        outcome = super().process_result(original, processor, batch, result)
        self.passes.append((time.perf_counter(), len(batch.reqs) if batch.forward_mode.is_decode() else 0))
        return outcome

    def switch_way(self, scheduler: Any, way: str, path: str) -> None:
        """Go over to another way; `path` is the segment of those that use one."""
        from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer, set_global_experts_capturer

        runner = scheduler.tp_worker.model_runner
        if not self.runners:
            self.capturer = get_global_experts_capturer()
            self.runners["stock"] = runner.decode_cuda_graph_runner
            device = self.capturer.device_cache
            self.twin = SimpleNamespace(name=device.name, buffer=device.buffer.clone())
        set_global_experts_capturer(None if way == "off" else self.capturer)
        self.way, graphs = way, _GRAPHS.get(way, way)
        if graphs not in self.runners:
            self.runners[graphs] = self._captured(runner)
        runner.decode_cuda_graph_runner = self.runners[graphs]
        self._ledger.enabled = way not in ("stock", "off")
        if self.ways_returns is None:
            self.switch_returns(scheduler, path)
            self.ways_returns = self._returns
        self._returns = self.ways_returns if self._ledger.enabled else None
        self._show()

    def _captured(self, runner: Any) -> Any:
        """Return decode graphs captured in the way of the moment, over the buffers of the first; a CPU has none."""
        if self.runners["stock"] is None:
            return None
        backend = runner.attn_backend
        backend.init_cuda_graph_state = lambda *a, **k: None  # all sets of graphs read the same state
        try:
            runner.init_decode_cuda_graph()
        finally:
            del backend.init_cuda_graph_state
        return runner.decode_cuda_graph_runner

    def _show(self) -> None:
        if self.way == "ours":
            setattr(self.cache, product._STORE, self.ours)
        elif hasattr(self.cache, product._STORE):
            delattr(self.cache, product._STORE)

    def facts(self, path: str, trim: bool) -> None:
        """Write what was seen since the last call, and sizes of buffers, to a file: control calls return nothing.

        With `trim`, pinned memory that is kept for later is given back then, so that the next peak is that of what
        follows.

        `passes`: when each was taken (`time.perf_counter`, one clock for all processes of a Linux host), and for how
        many requests it decoded, 0 for a pass over prompts. `released`: when the last hold had all its requests, null
        where it was let go without them; `queued`: how many it had seen.
        `pinned`: bytes of pinned memory that the process held at most, in use or kept for later, without SGLang's int32
        rows, which are there in every way of this engine.
        """
        assert self.ours is not None
        passes, self.passes = self.passes, []
        buffer = self.cache.buffer
        found = {
            "passes": passes,
            "released": self.released,
            "queued": self.queued,
            "slots": int(self.cache.num_tokens),
            "stock_bytes": int(buffer.numel() * buffer.element_size()),
            "stock_pinned": bool(buffer.is_pinned()) if _has_cuda() else False,
            "ours_bytes": int(self.ours.rows.nbytes),
            "copied_at_once": len(self._one_copy.layers),
            "pinned": _pinned_beside(buffer) if _has_cuda() else None,
        }
        Path(f"{path}.{_rank()}").write_text(json.dumps(found))
        if trim and _has_cuda():
            _trim()


def _put(cache: Any, layer_id: int, ids: Any) -> None:
    cache.buffer[: len(ids), layer_id, :] = ids


def _rank() -> int:
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().tp_rank)


def _pinned_beside(buffer: Any) -> int | None:
    """Return the peak since the last call; None from a torch that does not count.

    Not `active_bytes`, which falls for no block that a copy was queued from or into before pytorch PR #171662.
    """
    import torch

    count = getattr(torch.cuda, "host_memory_stats", None)
    if count is None:
        return None
    found = count().get("allocated_bytes.peak")
    torch.cuda.reset_peak_host_memory_stats()
    if found is None:
        return None
    size = int(buffer.numel() * buffer.element_size()) if buffer.is_pinned() else 0
    rounded = 1 << (size - 1).bit_length() if size else 0  # as torch's allocator of pinned memory rounds
    return max(0, int(found) - rounded)


def _trim() -> None:
    import torch

    torch.cuda.synchronize()
    torch._C._host_emptyCache()
    torch.cuda.reset_peak_host_memory_stats()


def _has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def register() -> None:
    """Hook SGLang's scheduler; entry point `r3_bench` of `sglang.srt.plugins`, made by the benchmark."""
    import sys

    scheduler = sys.modules.get("sglang.srt.managers.scheduler")
    if scheduler is None:
        return
    import sglang
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    reason = unfit(sglang.__version__, (*POINTS, *_EXTRA))
    if reason is not None:
        raise RuntimeError(reason)
    ways = Ways()
    for point in (*POINTS, *_EXTRA):
        if point.hook in ("drop_host_cache", "relabel_weights"):
            continue
        HookRegistry.register(point.target, getattr(ways, point.hook), HookType.AROUND)
    scheduler.Scheduler.r3_bench_way = lambda self, way, path: ways.switch_way(self, way, path)
    scheduler.Scheduler.r3_bench_hold = lambda self, requests: ways.hold(requests)
    scheduler.Scheduler.r3_bench_facts = lambda self, path, trim: ways.facts(path, trim)
