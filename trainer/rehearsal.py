"""One forced-routing step whose every result can be compared with another layout's: the proof behind a long job."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from r3.trainer.batching import MicroBatch, StepBatch
from r3.trainer.convert import export_weights
from r3.trainer.outcome import Rehearsal, Tensors
from r3.trainer.parallel import sum_over_ranks
from r3.trainer.policy import Policy, RoutingUse
from r3.trainer.tally import counts_over_ranks


def rehearse(policy: Policy, step: StepBatch, microbatches: Sequence[MicroBatch], use: RoutingUse) -> Rehearsal:
    """Run log-probs and one update of `policy`; collective.

    The old log-probs are the engine's, so that ratios differ from 1. Raises `RoutingError` when replay state is left
    behind by the forward-only pass or by the step.
    """
    before = policy.logprobs(microbatches, step, replace(use, trace=True))
    assert before.trace is not None
    policy.replay.require_empty("after a forward-only pass")
    old = step.rollout_logprobs.astype(np.float64)
    sums, counts, replay_s = policy.accumulate(microbatches, step, old, None, use)
    policy.replay.require_empty("after a step")
    gradients = arrays(export_weights(policy.chunks, policy.arch, lambda parameter: parameter.main_grad))
    _, grad_norm, _ = policy.optimizer.step()
    tokens, loss = sum_over_ranks(np.array([sums.tokens, sums.loss]))
    return Rehearsal(
        loss=float(loss / tokens),
        logprobs=sum_over_ranks(before.logprobs),
        differs=before.trace.of_tokens(np.arange(len(old))),
        grad_norm=float(grad_norm),
        gradients=gradients,
        weights=arrays(policy.export),
        counts=counts_over_ranks(counts),
        sharded=policy.gradients_sharded,
        replay_s=before.replay_s + replay_s,
    )


def arrays(tensors: Iterable[tuple[str, torch.Tensor]]) -> Tensors:
    """Return fp32 host copies of named tensors, those of rank 0 in a collective walk."""
    return {name: tensor.float().cpu().numpy().copy() for name, tensor in tensors}
