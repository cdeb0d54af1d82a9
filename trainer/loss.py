"""The objective as pure functions of tensors: token-level clipped policy gradient, KL penalty, log-probs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Objective:
    """The ratio is clipped to [1 - `clip_low`, 1 + `clip_high`]; `kl_coef` weighs the penalty towards the reference."""

    clip_low: float
    clip_high: float
    kl_coef: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class LossTerms:
    """Per token `[n]`: `loss` carries gradient, `clipped` (bool) and `kl` (nats, zeros without reference) do not."""

    loss: torch.Tensor
    clipped: torch.Tensor
    kl: torch.Tensor


def token_logprobs(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float, group: dist.ProcessGroup | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-prob of `labels` `[n]` and entropy (no gradient) in nats, each fp32 `[n]`.

    `logits` `[n, vocab]`, or this rank's slice of the vocabulary when the ranks of `group` share it. The distribution
    is softmax(logits / temperature), the one that the engine sampled from.
    """
    if group is None or group.size() == 1:
        scaled = torch.log_softmax(logits.float() / temperature, dim=-1)
        with torch.no_grad():
            entropy = -(scaled.exp() * scaled).sum(-1)
        return scaled.gather(1, labels[:, None]).squeeze(1), entropy
    logprobs, entropy = _SharedVocabulary.apply(logits.float() / temperature, labels, group)
    return logprobs, entropy


class _SharedVocabulary(torch.autograd.Function):
    """Log-prob and entropy over a vocabulary that the ranks of a group hold in equal slices, in rank order."""

    @staticmethod
    def forward(
        ctx: Any, scaled: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup
    ) -> tuple[torch.Tensor, torch.Tensor]:
        highest = scaled.amax(-1)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        shifted = scaled - highest[:, None]
        local = labels - group.rank() * scaled.shape[1]
        held = (local >= 0) & (local < scaled.shape[1])
        local = local.where(held, 0)
        exp = shifted.exp()
        # One collective for the three sums.
        sums = torch.stack([exp.sum(-1), (exp * shifted).sum(-1), shifted.gather(1, local[:, None])[:, 0] * held])
        dist.all_reduce(sums, group=group)
        total, weighted, chosen = sums
        ctx.save_for_backward(exp / total[:, None], local, held)
        entropy = total.log() - weighted / total
        ctx.mark_non_differentiable(entropy)
        return chosen - total.log(), entropy

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        probabilities, local, held = ctx.saved_tensors
        slope = -probabilities
        slope.scatter_add_(1, local[:, None], held[:, None].to(slope.dtype))
        return slope * gradient[:, None], None, None


def policy_loss(
    objective: Objective,
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    reference_logprobs: torch.Tensor | None = None,
) -> LossTerms:
    """Return GRPO's token-level terms (arXiv 2402.03300); all arguments `[n]`, log-probs in nats.

    -min(r A, clip(r) A) with r = exp(logprobs - old_logprobs), the old ones recomputed by the trainer under the same
    routing, so that r starts at 1. The penalty is k3 = exp(q) - 1 - q with q = reference - logprobs.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    free = ratio * advantages
    bounded = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high) * advantages
    loss = -torch.minimum(free, bounded)
    kl = torch.zeros_like(logprobs)
    if reference_logprobs is not None:
        q = reference_logprobs - logprobs
        kl = torch.expm1(q) - q
        loss = loss + objective.kl_coef * kl
    return LossTerms(loss, (bounded < free).detach(), kl.detach())
