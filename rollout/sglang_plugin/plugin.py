"""The entry point of the plugin: check SGLang's internals, then hook all of them or none."""

from __future__ import annotations

import inspect
import logging
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r3.errors import ConfigError
from r3.rollout.engines.sglang_args import check_release
from r3.rollout.sglang_plugin.hooks import Hooks, refuse
from r3.rollout.sglang_plugin.ledger import Ledger
from r3.rollout.sglang_plugin.weights import RECONSTRUCT, Received

logger = logging.getLogger(__name__)

_MANAGERS = "sglang.srt.managers"
_SCHEDULER = f"{_MANAGERS}.scheduler.Scheduler"
_RESULTS = f"{_MANAGERS}.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
_UPDATER = f"{_MANAGERS}.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_CAPTURE = "sglang.srt.state_capturer.base"
_EXPERTS = "sglang.srt.state_capturer.routed_experts"


@dataclass(frozen=True, slots=True)
class Point:
    """A method of SGLang, the hook around it, and the leading parameters that the hook relies on."""

    target: str
    hook: str
    parameters: tuple[str, ...]
    optional: bool = False


POINTS: tuple[Point, ...] = (
    Point(f"{_SCHEDULER}.run_batch", "run_batch", ("self", "batch")),
    Point(f"{_SCHEDULER}.on_idle", "on_pause", ("self",)),
    Point(f"{_SCHEDULER}.pause_generation", "on_pause", ("self", "recv_req")),
    Point(f"{_EXPERTS}.RoutedExpertsCapturer.__init__", "make_capturer", ("self", "model_config")),
    Point(f"{_CAPTURE}.BaseHostCache.__init__", "make_host_cache",
          ("self", "num_tokens", "num_layers", "topk_size", "name")),
    # 0.5.17 frees its buffer with the process.
    Point(f"{_CAPTURE}.BaseHostCache.destroy", "drop_host_cache", ("self",), optional=True),
    Point(f"{_CAPTURE}.BaseDeviceCache.capture", "capture", ("self", "layer_id", "topk_indices")),
    Point(f"{_CAPTURE}.BaseTopkCapturer.on_forward_end", "on_forward_end",
          ("self", "forward_batch", "can_run_graph", "cuda_graph_batch", "no_copy_to_cpu")),
    Point(f"{_CAPTURE}.TopkCaptureOutput.finalize", "finalize", ("self",)),
    Point(f"{_CAPTURE}.BaseTopkCapturer.get_topk", "get_topk",
          ("self", "req_pool_idx", "seqlen", "req_to_token_pool", "start_len")),
    Point(f"{_RESULTS}.process_batch_result_prefill", "process_result", ("self", "batch", "result")),
    Point(f"{_RESULTS}.process_batch_result_decode", "process_result", ("self", "batch", "result")),
    Point(f"{_RESULTS}._maybe_collect_routed_experts", "collect", ("self", "req")),
    *(Point(f"{_UPDATER}.update_weights_from_{source}", "update_weights", ("self", "recv_req"))
      for source in ("disk", "distributed", "tensor", "ipc")),
    # 0.5.17 keeps the name of the weights in the tokenizer manager alone, where `/update_weight_version` changes it.
    Point(f"{_SCHEDULER}.record_weight_version_change", "relabel_weights", ("self", "new_version"), optional=True),
)  # fmt: skip
# Attributes that the constructors of these classes set, and that the hooks use.
_ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    f"{_MANAGERS}.schedule_batch.Req": ("customized_info", "return_routed_experts", "routed_experts", "output_ids"),
    f"{_CAPTURE}.BaseDeviceCache": ("buffer", "name"),
    f"{_CAPTURE}.BaseHostCache": ("num_tokens", "buffer"),
    f"{_CAPTURE}.BaseTopkCapturer": ("host_cache",),
    _SCHEDULER: ("server_args",),
}
_CALLED = (f"{_CAPTURE}.TopkCaptureOutput.map_device_tensors", f"{_CAPTURE}.BaseHostCache._log_allocation")
_OPEN = (f"{_CAPTURE}.TopkCaptureOutput", f"{_MANAGERS}.utils.GenerationBatchResult", f"{_MANAGERS}.schedule_batch.Req")


def register() -> None:
    """Hook SGLang in a process that runs its scheduler; SGLang's `load_plugins` calls it in every process.

    Where the internals are not those that the hooks were written for (SGLang 0.5.17 to 0.5.23), one line says what
    differs and nothing is hooked.
    """
    scheduler = sys.modules.get(f"{_MANAGERS}.scheduler")
    if scheduler is None:
        return
    import sglang

    ledger = Ledger()
    hooks = Hooks(ledger)
    reason = unfit(sglang.__version__)
    if reason is not None:
        refuse(ledger, reason)
    else:
        _hook(hooks)
    # `Engine.collective_rpc` calls methods of the scheduler by name.
    scheduler.Scheduler.r3_provenance = lambda self, enabled: hooks.switch(self, enabled)
    scheduler.Scheduler.r3_returns = lambda self, path: hooks.switch_returns(self, path)
    scheduler.Scheduler.r3_one_copy = lambda self: hooks.require_one_copy()
    _verify_weights(scheduler.Scheduler)


def _verify_weights(scheduler: Any) -> None:
    """Note the checksum of every bucket of weights, and offer to compare it; independent of the stamps."""
    received, fault = Received(), _misfit(Point(RECONSTRUCT, "reconstruct", ("self",)))

    def compare(self: Any, expected: Sequence[int] | None = None, version: int = 0) -> None:
        if fault is not None:
            raise RuntimeError(fault)
        if expected is None:
            received.start()
        else:
            received.check(self, expected, version)

    if fault is None:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register(RECONSTRUCT, received.reconstruct, HookType.AROUND)
    scheduler.r3_weights = compare


def unfit(version: str, points: Sequence[Point] = POINTS) -> str | None:
    """Return what is not as the hooks expect it in this SGLang, None when all is."""
    try:
        check_release(version)
    except ConfigError as error:
        return str(error)
    for point in points:
        fault = _misfit(point)
        if fault is not None:
            return f"SGLang {version}: {fault}"
    for name, attributes in _ATTRIBUTES.items():
        lacking = set(attributes) - set(pkgutil.resolve_name(name).__init__.__code__.co_names)
        if lacking:
            return f"SGLang {version}: {name} sets no {', '.join(sorted(lacking))}"
    gone = [name for name in _CALLED if _misfit(Point(name, "", ("self",))) is not None]
    if gone:
        return f"SGLang {version}: {', '.join(gone)} does not exist"
    closed = [name for name in _OPEN if not pkgutil.resolve_name(name).__dictoffset__]
    if closed:
        return f"SGLang {version}: {', '.join(closed)} takes no attribute of ours"
    return _inheritance_fault(version)


def _misfit(point: Point) -> str | None:
    try:
        method = pkgutil.resolve_name(point.target)
    except (AttributeError, ImportError) as error:
        return None if point.optional else f"{point.target} does not exist ({error})"
    found = tuple(inspect.signature(method).parameters)[: len(point.parameters)]
    return None if found == point.parameters else f"{point.target} takes {found}, expected {point.parameters}"


def _inheritance_fault(version: str) -> str | None:
    """The capturer of experts must use the base class's methods, or a hook of those would never run."""
    base = pkgutil.resolve_name(f"{_CAPTURE}.BaseTopkCapturer")
    routed: Any = pkgutil.resolve_name(f"{_EXPERTS}.RoutedExpertsCapturer")
    own = [name for name in ("on_forward_end", "get_topk") if getattr(routed, name) is not getattr(base, name)]
    return f"SGLang {version}: RoutedExpertsCapturer has its own {', '.join(own)}" if own else None


def _hook(hooks: Hooks) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for point in POINTS:
        if not (point.optional and _is_absent(point)):
            HookRegistry.register(point.target, getattr(hooks, point.hook), HookType.AROUND)


def _is_absent(point: Point) -> bool:
    try:
        pkgutil.resolve_name(point.target)
    except AttributeError:
        return True
    return False
