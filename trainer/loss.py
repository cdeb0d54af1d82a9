"""The objective as pure functions of tensors: token-level clipped policy gradient, KL penalty, log-probs."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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


def token_logprobs(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-prob of `labels` `[n]` and entropy (no gradient) in nats, each fp32 `[n]`.

    `logits` `[n, vocab]`. The distribution is softmax(logits / temperature), the one that the engine sampled from.
    """
    scaled = torch.log_softmax(logits.float() / temperature, dim=-1)
    with torch.no_grad():
        entropy = -(scaled.exp() * scaled).sum(-1)
    return scaled.gather(1, labels[:, None]).squeeze(1), entropy


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
