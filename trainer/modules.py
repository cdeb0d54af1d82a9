"""Two modules of the layer spec that Megatron-core's local ones cannot give: RMSNorm and SDPA attention.

`WrappedTorchNorm` refuses sequence parallelism and `DotProductAttention` refuses context parallelism and packed
sequences (torch_norm.py, dot_product_attention.py; the same in 0.16.1 and 0.19.2), so both are replaced from the start.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from r3.trainer.megatron import MegatronModule, TransformerConfig, parallel_state
from r3.trainer.packing import Packing

# PyTorch with this kernel computes bfloat16 in fp32 by itself, on a GPU in one launch where casts make it four. Earlier
# ones (seen in the source of 2.4) round before they multiply by the weight.
_ROUNDS_ONCE = hasattr(torch, "_fused_rms_norm")


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
        if _ROUNDS_ONCE:
            return F.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)
        return F.rms_norm(hidden.float(), (hidden.shape[-1],), self.weight.float(), self.eps).to(hidden.dtype)


class SdpaAttention(MegatronModule):
    """Causal grouped-query attention on PyTorch's scaled dot product, for padded and packed (THD) batches.

    Pads need no mask: they stand right of every token of their sequence, where causality hides them. Under context
    parallelism a rank holds chunks r and 2 * size - 1 - r of every sequence (Megatron's zigzag), gathers keys and
    values, and attends from each chunk to all keys up to its own end.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)
        self.context_group = getattr(pg_collection, "cp", None) or parallel_state.get_context_parallel_group()

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
        """Attend from `query` to `key` and `value`; return `[s, b, heads * d]`, packed `[t, heads * d]`.

        Padded: `[s, b, heads or groups, d]`. Packed: `[t, heads or groups, d]` with a `Packing` of whole sequences.
        """
        if packed_seq_params is None:
            return self._padded(query, key, value).flatten(2)
        assert isinstance(packed_seq_params, Packing)
        return self._packed(query, key, value, packed_seq_params).flatten(1)

    def _padded(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """All sequences of one length, `[s, b, heads, d]`."""
        size, rank = self.context_group.size(), self.context_group.rank()
        if size == 1:
            return self._attend(query, key, value)
        keys, values = map(_in_order, _Gather.apply(torch.stack([key, value]), self.context_group))
        chunk, parts = len(query) // 2, []
        for part, index in zip(query.split(chunk), (rank, 2 * size - 1 - rank), strict=True):
            end = (index + 1) * chunk
            parts.append(self._attend(part, keys[:end], values[:end]))
        return torch.cat(parts)

    def _packed(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Sequences end to end, `[t, heads, d]`."""
        size, rank = self.context_group.size(), self.context_group.rank()
        if size == 1:
            return self._as_padded_batches(query, key, value, packing)
        local = [length // size for length in packing.lengths]
        key, value = _Gather.apply(torch.stack([key, value]), self.context_group)
        keys, values = (
            [_in_order(torch.stack(ranks)) for ranks in zip(*(one.split(local) for one in part), strict=True)]
            for part in (key, value)
        )
        mixed = []
        for q, k, v in zip(query.split(local), keys, values, strict=True):
            for part, index in zip(q.split(len(q) // 2), (rank, 2 * size - 1 - rank), strict=True):
                end = (index + 1) * (len(q) // 2)
                mixed.append(self._attend(part[:, None], k[:end, None], v[:end, None])[:, 0])
        return torch.cat(mixed)

    def _as_padded_batches(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing
    ) -> torch.Tensor:
        assert packing.back is not None
        mixed = []
        for rows in packing.batches:
            flat, shape = rows.flatten(), rows.shape
            # Not by `[]`, whose backward sorts: a pad's gradient is zero, so it does not matter who adds it when.
            parts = (one.index_select(0, flat).unflatten(0, shape) for one in (query, key, value))
            mixed.append(self._attend(*parts).flatten(0, 1))
        return (mixed[0] if len(mixed) == 1 else torch.cat(mixed)).index_select(0, packing.back)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend causally, the last query seeing every key; `[s, b, heads, d]` to `[n, b, groups, d]`, `n >= s`."""
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        rows, columns = q.shape[2], k.shape[2]
        mask = None
        if rows != columns:
            mask = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return mixed.permute(2, 0, 1, 3)


class _Gather(torch.autograd.Function):
    """Gather `[2, s, ...]` of every rank as `[2, size, s, ...]`; backward sums the ranks' gradients of the own part."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(parts, local.contiguous(), group=group)
        return torch.stack(parts, 1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        # gloo has no reduce-scatter of lists that autograd could use here; sum, then keep the own part.
        total = gradient.contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total[:, ctx.group.rank()], None


def _in_order(ranks: torch.Tensor) -> torch.Tensor:
    """Undo the zigzag: `[size, s, ...]` of the ranks becomes `[size * s, ...]` in the order of positions."""
    first, second = ranks.chunk(2, dim=1)
    return torch.cat([first.flatten(0, 1), second.flip(0).flatten(0, 1)])
