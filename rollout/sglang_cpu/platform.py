"""SGLang's hardware platform for plain PyTorch on a CPU.

Declared as entry point `r3_cpu` of the group `sglang.srt.platforms`. SGLang's own CPU backend needs kernels that PyPI
does not carry; an out-of-tree platform without Triton makes it take the torch-native allocator, attention, MoE and
sampler instead (`srt/platforms/interface.py`: `capabilities`, `get_dispatch_key_name`).
"""

from __future__ import annotations


def activate() -> str | None:
    """Return the platform class for SGLang to load, or None (stock SGLang) wherever an accelerator is present."""
    import torch

    if torch.cuda.is_available() or torch.xpu.is_available():
        return None
    return "r3.rollout.sglang_cpu.torch_cpu:TorchCpuPlatform"
