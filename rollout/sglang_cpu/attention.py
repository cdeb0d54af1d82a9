"""Attention of one new token per sequence, for all sequences of a batch in one call.

SGLang's `torch_native` backend calls scaled dot-product attention once per sequence and layer in a Python loop, half
of a decode step with 256 short sequences on two cores. The mathematics is the same; only the order of sums may differ.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.functional import scaled_dot_product_attention

# KV slots gathered at once: bounds the memory of long sequences (64 Ki slots x 2 heads x 128 x 4 bytes = 64 MiB).
_SLOTS = 65_536


class BatchedDecodeBackend(TorchNativeAttnBackend):
    """`torch_native` with a batched decode; longer prefills, sliding windows and cross attention stay SGLang's own."""

    def _run_sdpa_forward_extend(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_prefix_lens: torch.Tensor,
        extend_seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Prefill; where only the last token of every prompt is new (the rest is cached) that is a decode step."""
        shared = (query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens)
        if options.get("causal") and encoder_lens is None and bool((extend_seq_lens == 1).all()):
            return self._run_sdpa_forward_decode(*shared, encoder_lens, **(options | {"causal": False}))
        return super()._run_sdpa_forward_extend(*shared, extend_prefix_lens, extend_seq_lens, encoder_lens, **options)

    def _run_sdpa_forward_decode(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        **options: Any,
    ) -> torch.Tensor:
        """Attend a query per sequence `[sequences, heads, head_dim]` to its cached keys; fill and return `output`."""
        if encoder_lens is not None or options.get("sliding_window_size") is not None:
            return super()._run_sdpa_forward_decode(
                query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, encoder_lens,
                scaling=scaling, enable_gqa=enable_gqa, **options,
            )  # fmt: skip
        longest = int(seq_lens.max())
        step = max(1, _SLOTS // longest)
        for begin in range(0, len(seq_lens), step):
            part = slice(begin, begin + step)
            valid = torch.arange(longest) < seq_lens[part, None]
            # Behind a sequence's end the table holds slots of others; slot 0 is SGLang's own padding slot.
            slots = req_to_token[req_pool_indices[part], :longest].long().masked_fill(~valid, 0)
            output[part] = scaled_dot_product_attention(
                query[part, :, None],
                k_cache[slots].transpose(1, 2).to(query.dtype),
                v_cache[slots].transpose(1, 2).to(query.dtype),
                attn_mask=valid[:, None, None],
                enable_gqa=enable_gqa,
                scale=scaling,
            ).squeeze(2)
        return output
