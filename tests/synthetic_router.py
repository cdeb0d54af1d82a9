"""Routing without a model: experts that follow token and context, unevenly loaded, and a trainer that nearly agrees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from r3.routing import RoutingTrace, expert_dtype

VOCABULARY = 500
_HIDDEN = 24


@dataclass(frozen=True, slots=True)
class Shape:
    """MoE layers, experts per token, experts."""

    layers: int
    k: int
    experts: int


@dataclass(frozen=True, slots=True)
class Sample:
    """A sequence with its record, and `own` `[rows, layers, k]`: the experts that the trainer would choose."""

    tokens: NDArray[np.int32]
    trace: RoutingTrace
    own: NDArray[np.unsignedinteger]


class Router:
    """One synthetic model; `noise`: spread of the trainer's logits around the engine's, whose own spread is about 1."""

    def __init__(self, shape: Shape, seed: int, noise: float = 0.03) -> None:
        generator = np.random.default_rng(seed)
        self._shape, self._noise, self._generator = shape, noise, generator
        self._embedding = generator.normal(size=(VOCABULARY, _HIDDEN))
        self._mixing = generator.normal(size=(shape.layers, _HIDDEN, _HIDDEN)) / np.sqrt(_HIDDEN)
        self._gate = generator.normal(size=(shape.layers, _HIDDEN, shape.experts)) / np.sqrt(_HIDDEN)
        # A few experts are chosen often and some hardly ever, as in a real model.
        self._skew = 0.7 * generator.normal(size=(shape.layers, shape.experts))

    def logits(self, tokens: NDArray[np.int32]) -> NDArray[np.float64]:
        """Return `[tokens, layers, experts]`; the hidden state of a token holds a fading memory of those before it."""
        hidden = self._embedding[tokens]
        memory = np.zeros(_HIDDEN)
        context = np.empty_like(hidden)
        for t, row in enumerate(hidden):
            memory = 0.8 * memory + 0.2 * row
            context[t] = memory
        hidden = hidden + context
        layers = []
        for mixing, gate, skew in zip(self._mixing, self._gate, self._skew, strict=True):
            hidden = hidden + np.tanh(hidden @ mixing)
            hidden /= np.sqrt((hidden**2).mean(axis=1, keepdims=True))
            layers.append(hidden @ gate + skew)
        return np.stack(layers, axis=1)

    def sample(self, length: int) -> Sample:
        """Return a random sequence of `length` tokens, in which tokens and short phrases come back, as in text."""
        draw = self._generator
        tokens = (VOCABULARY * draw.random(length) ** 2).astype(np.int32)
        for begin in range(4, length - 8, 40):
            tokens[begin : begin + 4] = tokens[begin - 4 : begin]
            tokens[begin + 4 : begin + 7] = tokens[begin + 4]
        logits = self.logits(tokens[:-1])
        record = RoutingTrace.record(
            top_k(logits, self._shape.k), tokens, layers=range(self._shape.layers), num_experts=self._shape.experts,
            weight_version=1, engine="synthetic 1",
        )  # fmt: skip
        noisy = logits + self._noise * draw.normal(size=logits.shape)
        return Sample(tokens, record, top_k(noisy, self._shape.k).astype(expert_dtype(self._shape.experts)))


def top_k(logits: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Return the indices of the k largest of `[..., experts]`, largest first."""
    return np.argsort(-logits, axis=-1)[..., :k]
