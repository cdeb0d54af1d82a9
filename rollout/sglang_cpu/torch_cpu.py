"""The platform class itself; imported by SGLang after `platform.activate` has named it."""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """SGLang's CPU device operations, as an out-of-tree platform that can launch neither Triton nor CUDA graphs."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        """Attention through `torch.nn.functional.scaled_dot_product_attention`."""
        return "torch_native"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        """No device copies from host memory here, so nothing is pinned."""
        return False

    def init_backend(self) -> None:
        """Make two registrations; SGLang calls this once in each worker.

        The host allocator of routing capture gets a CPU entry: without one the capture's buffer is registered with the
        CUDA runtime (`mem_cache/pool_host/common.py`, whose table has entries for npu, musa and xpu), and the engine
        dies at start. The attention backend `torch_native` becomes the batched one.
        """
        from sglang.srt.layers.attention.attention_registry import register_attention_backend
        from sglang.srt.mem_cache.pool_host import common

        common.ALLOC_MEMORY_FUNCS["cpu"] = _allocate_unpinned
        register_attention_backend("torch_native")(_make_attention)


def _make_attention(runner: Any) -> Any:
    from r3.rollout.sglang_cpu.attention import BatchedDecodeBackend

    return BatchedDecodeBackend(runner)


def _allocate_unpinned(
    dims: tuple[int, ...], dtype: Any, device: str, pin_memory: bool, allocator: Any, **unused: Any
) -> Any:
    """Allocate host memory; the parameters are those of SGLang's allocator table."""
    import torch

    return torch.empty(dims, dtype=dtype, device=device)
