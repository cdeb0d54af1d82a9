"""The objective, checked against its formulas."""

from __future__ import annotations

import pytest
import torch

from r3.trainer.loss import Objective, policy_loss, token_logprobs

OBJECTIVE = Objective(clip_low=0.2, clip_high=0.3)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_logprobs_and_entropy_are_those_of_the_tempered_distribution(temperature: float) -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([0, 3, 10, 3, 7])
    expected = torch.distributions.Categorical(logits=logits / temperature)
    logprobs, entropy = token_logprobs(logits, labels, temperature)
    torch.testing.assert_close(logprobs.double(), expected.log_prob(labels), atol=1e-6, rtol=0)
    torch.testing.assert_close(entropy.double(), expected.entropy(), atol=1e-6, rtol=0)


def test_first_update_has_the_policy_gradient() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([0.5, -1.5])
    terms = policy_loss(OBJECTIVE, logprobs, logprobs.detach(), advantages)
    terms.loss.sum().backward()
    torch.testing.assert_close(terms.loss.detach(), -advantages)
    torch.testing.assert_close(logprobs.grad, -advantages)
    assert not terms.clipped.any()


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss", "clipped"),
    [
        (0.5, 2.0, -1.3 * 2, True),
        (-0.5, -2.0, 0.8 * 2, True),
        (0.5, -2.0, 2 * 1.6487213, False),
        (-0.5, 2.0, -2 * 0.6065307, False),
        (0.1, 2.0, -2 * 1.1051709, False),
    ],
)
def test_only_moves_beyond_the_clip_in_the_good_direction_stop_the_gradient(
    log_ratio: float, advantage: float, loss: float, clipped: bool
) -> None:
    logprobs = torch.tensor([-1.0 + log_ratio], requires_grad=True)
    terms = policy_loss(OBJECTIVE, logprobs, torch.tensor([-1.0]), torch.tensor([advantage]))
    terms.loss.sum().backward()
    assert terms.loss.item() == pytest.approx(loss, rel=1e-5)
    assert bool(terms.clipped) is clipped
    assert (logprobs.grad.item() == 0) is clipped


def test_kl_penalty_is_k3_towards_the_reference() -> None:
    logprobs = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    reference = torch.tensor([-1.0, -1.5, -0.5])
    zeros = torch.zeros(3)
    terms = policy_loss(Objective(0.2, 0.2, kl_coef=0.1), logprobs, logprobs.detach(), zeros, reference)
    q = reference - logprobs.detach()
    torch.testing.assert_close(terms.kl, torch.exp(q) - 1 - q)
    torch.testing.assert_close(terms.loss.detach(), 0.1 * terms.kl)
    terms.loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, 0.1 * (1 - torch.exp(q)))


def test_without_reference_there_is_no_penalty() -> None:
    logprobs = torch.tensor([-1.0])
    terms = policy_loss(Objective(0.2, 0.2, kl_coef=0.1), logprobs, logprobs, torch.tensor([1.0]))
    assert terms.loss.item() == -1
    assert terms.kl.item() == 0
