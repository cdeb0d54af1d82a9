"""What the counters of a pass must say of its records, counted from the records themselves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def expert_loads(experts: NDArray[np.unsignedinteger], num_experts: int) -> NDArray[np.int64]:
    """Count how often each expert was chosen in routing `[rows, layers, k]`; int64 `[layers, experts]`."""
    layers = range(experts.shape[1])
    counts = [np.bincount(experts[:, layer].reshape(-1), minlength=num_experts) for layer in layers]
    return np.array(counts, np.int64).reshape(len(layers), num_experts)
