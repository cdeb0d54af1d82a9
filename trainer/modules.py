"""Two modules of the layer spec that Megatron-core's local ones cannot give: RMSNorm and SDPA attention.

`WrappedTorchNorm` refuses sequence parallelism and `DotProductAttention` refuses context parallelism and packed
sequences (torch_norm.py, dot_product_attention.py; the same in 0.16.1 and 0.19.2), so both are replaced from the start.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from r3.trainer.megatron import MegatronModule, TransformerConfig


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # `finalize_model_grads` sums gradients of weights with this mark over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the normalised `hidden` `[..., hidden_size]` in its own dtype."""
        normed = F.rms_norm(hidden.float(), (hidden.shape[-1],), self.weight.float(), self.eps)
        return normed.to(hidden.dtype)


class SdpaAttention(MegatronModule):
    """Causal grouped-query attention on PyTorch's scaled dot product.

    Pads need no mask: they stand right of every token of their row, where causality hides them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        """Attend from `query` `[s, b, heads, d]` to `key`, `value` `[s, b, groups, d]`; return `[s, b, heads * d]`."""
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        grouped = q.shape[1] != k.shape[1]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
        return mixed.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
