"""Dispatch of tokens to experts that all live on this rank: nothing is asked of the device, nothing is sorted twice.

Megatron-core's all-to-all dispatcher brings the tokens per expert to the host in every layer, for splits that one rank
does not have, and sorts chunks that are in order already. The host then waits for the GPU in every layer, and whatever
it does beside, replay included, is time in which the GPU has nothing to do.
"""

from __future__ import annotations

from typing import Any

import torch

from r3.trainer.megatron import MoEAlltoAllTokenDispatcher, MoELayer


class LocalDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron-core's dispatcher for one expert-parallel and one expert-tensor-parallel rank.

    The experts get `tokens_per_expert` int64 `[experts]` on the device of the tokens, as `GroupedExperts` takes it.
    """

    tokens_per_expert: Any

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Count the tokens of each expert, on the device."""
        self.num_out_tokens = routing_map.shape[0] * self.config.moe_router_topk
        return routing_map.sum(0)

    def dispatch_postprocess(self, global_input_tokens: torch.Tensor, global_probs: torch.Tensor) -> tuple[Any, ...]:
        """Return the tokens as they are: the first permutation has sorted them by expert."""
        counts, self.tokens_per_expert = self.tokens_per_expert, None
        return global_input_tokens, counts, global_probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the tokens as they are."""
        return hidden_states

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Any = None) -> Any:
        return tokens_per_expert


def dispatch_locally(model: torch.nn.Module) -> None:
    """Give every MoE layer of `model` whose experts are all on this rank a `LocalDispatcher`."""
    for layer in model.modules():
        if not isinstance(layer, MoELayer):
            continue
        found = layer.token_dispatcher
        if type(found) is MoEAlltoAllTokenDispatcher and found.ep_size == found.tp_size == 1:
            # The state is the same; only what is done with it is not.
            found.__class__ = LocalDispatcher
