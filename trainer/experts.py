"""The experts of one layer as two grouped matrix products, in the place of Megatron-core's loop over experts.

Megatron-core's own grouped experts need Transformer Engine (or, until 0.16, a package of its own); PyTorch has the
product itself, `torch.nn.functional.grouped_mm`, for CUDA and for the CPU. Dispatch, combination and gate weights stay
Megatron's, so expert and expert-tensor parallelism and activation recompute are what they are for its own experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from r3.config import TrainerConfig
from r3.errors import ConfigError
from r3.trainer.architecture import Architecture
from r3.trainer.megatron import MegatronModule, TransformerConfig

# The CUDA kernel reads rows of 16 bytes.
_ALIGNMENT = 8


def uses_grouped(arch: Architecture, trainer: TrainerConfig) -> bool:
    """Tell whether the experts are computed as grouped products; see `trainer.experts`.

    `auto` takes them on a Hopper GPU, in bfloat16, where the kernel reads the model's sizes. Raises `ConfigError` where
    they are asked for and cannot be had: on other GPUs wrong weight gradients were reported for experts without tokens
    (pytorch issues #172439, #174314, #193633).
    """
    # Transformer Engine's layers have grouped experts of their own.
    if trainer.experts == "sequential" or trainer.transformer_engine or not arch.spec.moe_layers:
        return False
    sizes = (arch.spec.hidden_size, arch.expert_ffn_size // trainer.expert_tensor)
    missing = None
    if not hasattr(F, "grouped_mm"):
        missing = f"torch {torch.__version__} has no grouped_mm; it needs 2.10 or later"
    elif torch.cuda.is_available() and not _is_hopper():
        missing = "its weight gradients are known to be right on Hopper GPUs (compute capability 9) alone"
    elif torch.cuda.is_available() and trainer.dtype == "bfloat16" and any(size % _ALIGNMENT for size in sizes):
        missing = f"its kernel needs hidden and expert sizes that 8 divides, this rank's are {sizes[0]} and {sizes[1]}"
    if trainer.experts == "grouped":
        if missing:
            raise ConfigError(f"trainer.experts=grouped: {missing}; set trainer.experts: sequential")
        return True
    return missing is None and torch.cuda.is_available() and trainer.dtype == "bfloat16"


def _is_hopper() -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability()[0] == 9


class GroupedExperts(MegatronModule):
    """SwiGLU experts whose weights lie in one tensor each: `fc1` `[experts, 2 * ffn, hidden]`, `fc2`
    `[experts, hidden, ffn]`, of this rank's experts and of its expert-tensor-parallel part of `ffn`.

    `fc1` holds the gate projection over the up projection, as Megatron-core's `linear_fc1` does.
    """

    def __init__(self, num_local_experts: int, config: TransformerConfig, pg_collection: Any = None, **_: Any) -> None:
        super().__init__(config=config)
        hidden, ffn = config.hidden_size, config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        self.fc1 = self._weight(num_local_experts, 2 * ffn, hidden)
        self.fc2 = self._weight(num_local_experts, hidden, ffn)

    def _weight(self, *shape: int) -> torch.nn.Parameter:
        where = None if self.config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.nn.Parameter(torch.empty(*shape, dtype=self.config.params_dtype, device=where))
        # Megatron's DDP reduces a weight without this mark over all ranks, and experts differ from rank to rank.
        weight.allreduce = self.config.expert_model_parallel_size == 1  # type: ignore[attr-defined]
        return weight

    def forward(
        self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """Apply this rank's experts to `tokens` `[n, hidden]`, sorted by expert; return `[n, hidden]`, no bias.

        `tokens_per_expert` integers `[experts]`, on the host or the device; `probs` `[n]`: gate weights.
        """
        if not len(tokens):
            # No group has a row. One expert's products keep every weight in the graph, with a gradient of zero.
            hidden = _weighted(F.linear(tokens, self.fc1[0]), probs)
            return F.linear(hidden, self.fc2[0]), None
        ends = tokens_per_expert.cumsum(0, dtype=torch.int32).to(tokens.device, non_blocking=True)
        hidden = _weighted(F.grouped_mm(tokens, self.fc1.transpose(1, 2), offs=ends), probs)
        return F.grouped_mm(hidden, self.fc2.transpose(1, 2), offs=ends), None

    def backward_dw(self) -> None:
        """Weight gradients are part of backward; Megatron-core asks for this method."""


def _weighted(projected: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up times the gate weight, `[n, ffn]` from `[n, 2 * ffn]`, as Megatron-core's `MLP` does."""
    gate, up = projected.chunk(2, dim=-1)
    mixed = F.silu(gate) * up
    return (mixed * probs.unsqueeze(-1)).to(projected.dtype)
