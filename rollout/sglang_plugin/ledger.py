"""The book that the plugin keeps in the scheduler process: passes, their weights, and who wrote each slot."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from r3.rollout.provenance import Weights, pack, to_bytes

LAST = 2**31 - 1


class Ledger:
    """Numbers forward passes and remembers, per KV slot, the last one that wrote its routing row.

    `slots` int32 `[KV slots]`, 0 where no pass has written: four bytes beside the 4 x layers x k of a row. One object
    per scheduler process, used from its one thread. Numbers end behind `LAST` (eight months at 100 passes a second).
    """

    def __init__(self) -> None:
        self.enabled = True
        self.refusal: str | None = None
        self.forward = 0
        self.weights: list[Weights] = []
        self.slots: NDArray[np.int32] | None = None
        self._label = ""
        self._updates = 0

    @property
    def active(self) -> bool:
        """Does the plugin stamp?"""
        return self.enabled and self.refusal is None

    def begin_forward(self) -> int:
        """Number the pass that has just been started and note its weights."""
        self.forward += 1
        if self.forward == LAST:
            self.refusal = f"pass {LAST} was the last that four bytes can number; restart the engine"
        last = self.weights[-1] if self.weights else None
        if last is None or (last.label, last.updates) != (self._label, self._updates):
            self.weights.append(Weights(self.forward, self._label, self._updates))
        return self.forward

    def label_weights(self, label: str) -> None:
        """Note the name that the engine gives to its weights."""
        self._label = label

    def weights_changed(self) -> None:
        """Note an update of the weights, complete or not, whatever they are called."""
        self._updates += 1

    def stamp(self, slots: NDArray[np.integer[Any]], forward: int, capacity: int) -> None:
        """Note that `forward` wrote the rows of `slots` `[tokens]`, out of `capacity`."""
        if self.slots is None:
            self.slots = np.zeros(capacity, dtype=np.int32)
        self.slots[slots] = forward

    def stamps_of(self, slots: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
        """Return the pass that last wrote each of `slots`."""
        return np.zeros(len(slots), np.int32) if self.slots is None else self.slots[slots]

    def statement(self, rows: NDArray[np.int32], tokens: NDArray[np.int32]) -> dict[str, Any]:
        """Return what an answer carries: the passes of its rows and of its sampled tokens, and their weights."""
        return pack(rows, tokens, self.weights)

    def statement_bytes(self, slots: NDArray[np.integer[Any]], tokens: NDArray[np.int32]) -> bytes:
        """Return the same for the rows of `slots` as they are now, in the form that lies beside rows in memory."""
        return to_bytes(self.stamps_of(slots), tokens, self.weights)
