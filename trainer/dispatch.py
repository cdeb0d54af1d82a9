"""Dispatch of tokens to experts that all live on this rank: nothing is asked of the device, nothing is sorted twice.

Megatron-core's all-to-all dispatcher brings the tokens per expert to the host in every layer, for splits that one rank
does not have, and sorts chunks that are in order already. To sort the tokens by expert it waits for the number of rows
that a mask selects, twice a layer (`permute` in moe_utils.py, 0.16.1), or sorts the whole map of tokens and experts
(0.19.2); that number is known, as every token has top-k experts. A host that waits in every layer, or that has more to
launch than its GPU has to do, is never ahead of it, and what it does beside, replay included, is time of the step.
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

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens `[t * k, hidden]`, sorted by expert and place, and their gate weights `[t * k]`.

        `hidden_states` `[..., hidden]` of `t` tokens; `routing_map` bool, `probs` `[t, experts]`. A token with fewer
        than k experts leaves rows behind the last expert's, copies of the first token that no product takes.
        """
        self.hidden_shape, self.probs, self.routing_map = hidden_states.shape, probs, routing_map
        tokens = hidden_states.view(-1, self.hidden_shape[-1])
        self.hidden_shape_before_permute = tokens.shape
        self.tokens_per_expert = routing_map.sum(0)
        size = len(tokens) * self.config.moe_router_topk
        expert, token = torch.nonzero_static(routing_map.T, size=size, fill_value=0).unbind(1)
        self.reversed_local_input_permutation_mapping = token
        gates = probs.flatten().index_select(0, token * probs.shape[1] + expert)
        return tokens.index_select(0, token), gates

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
        alone = type(found) is MoEAlltoAllTokenDispatcher and found.ep_size == found.tp_size == 1
        if alone and found.shared_experts is None:
            # The state is the same; only what is done with it is not.
            found.__class__ = LocalDispatcher
