"""What passes without training gave, and how two rehearsals are compared; numpy only, so that the driver reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from r3.metrics import RouterCounts

Tensors = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What one log-prob pass and one update gave, over all ranks.

    `loss`: mean over trained tokens; `logprobs` float64 `[T]`, nats; `differs` bool `[T, layers]`: does the layer's own
    top-k set differ from the record, for the row behind the token; `grad_norm`: before clipping; `gradients`,
    `weights` (behind the update): fp32 by Hugging Face name, on rank 0 alone, empty elsewhere; `sharded`: a distributed
    optimizer left each rank a part of the reduced gradient only, so `gradients` are not whole; `replay_s`: this rank's
    seconds in replay.
    """

    loss: float
    logprobs: NDArray[np.float64]
    differs: NDArray[np.bool_]
    grad_norm: float
    gradients: Tensors
    weights: Tensors
    counts: RouterCounts
    sharded: bool
    replay_s: float


@dataclass(frozen=True, slots=True)
class Recomputation:
    """One pass over some batches: `logprobs` float64 `[T]` nats; `overlaps`: `router/*` of the audit, if it was asked.

    `seconds`: wall time on rank 0.
    """

    logprobs: NDArray[np.float64]
    counts: RouterCounts
    overlaps: Mapping[str, float]
    seconds: float


@dataclass(frozen=True, slots=True)
class Recomputed:
    """The same response tokens under several uses of their records.

    `rollout` float64 `[T]`: the engine's log-probs, nats; `lengths`, `groups` int64 `[n]`: response tokens and group of
    each sequence; `passes`: one for each use.
    """

    rollout: NDArray[np.float64]
    lengths: NDArray[np.int64]
    groups: NDArray[np.int64]
    passes: tuple[Recomputation, ...]


def worst_difference(found: Tensors, expected: Tensors) -> tuple[float, str]:
    """Return the largest |difference| of a tensor relative to its largest element, and the tensor's name.

    Raises `KeyError` when the names differ.
    """
    if found.keys() != expected.keys():
        raise KeyError(f"tensors differ by name: {sorted(found.keys() ^ expected.keys())[:3]}")
    return max(
        (float(np.abs(found[name] - tensor).max() / (np.abs(tensor).max() + 1e-20)), name)
        for name, tensor in expected.items()
    )
