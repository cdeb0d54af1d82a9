"""Credit assignment: rewards of a group of samples to one advantage per sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# GRPO's epsilon keeps a group of nearly equal rewards from being blown up.
_EPSILON = 1e-4


def advantages(rewards: NDArray[np.floating], groups: NDArray[np.integer], kind: str) -> NDArray[np.float32]:
    """Return the advantage `[n]` of every sample from `rewards` `[n]` and group indices `groups` `[n]`.

    `kind`: `std` (GRPO, arXiv 2402.03300: reward minus group mean, over group standard deviation), `mean` (Dr. GRPO,
    arXiv 2503.20783: without the division) or `leave_one_out` (RLOO, arXiv 2402.14740: baseline of the other samples).
    Groups may have lost members; a group of one has advantage 0.
    """
    values = np.asarray(rewards, np.float64)
    result = np.zeros_like(values)
    for group in np.unique(groups):
        members = groups == group
        if members.sum() > 1:
            result[members] = _KINDS[kind](values[members])
    return result.astype(np.float32)


def _std(rewards: Array) -> Array:
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + _EPSILON)


def _mean(rewards: Array) -> Array:
    return rewards - rewards.mean()


def _leave_one_out(rewards: Array) -> Array:
    n = len(rewards)
    return rewards - (rewards.sum() - rewards) / (n - 1)


_KINDS: Mapping[str, Callable[[Array], Array]] = {"std": _std, "mean": _mean, "leave_one_out": _leave_one_out}
