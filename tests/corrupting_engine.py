"""Real SGLang whose records are well formed and wrong, for `rollout.engine`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from r3.rollout.engine import Generation, Request, Sampling
from r3.rollout.engines.sglang import SglangEngine
from r3.routing import checksum
from r3.types import WeightVersion
from r3.weights import WeightSource
from tests.cases.payloads import Corruption, foreign_rows, layers_swapped, rows_shifted


class ShiftedRows(SglangEngine):
    """Gives every token the experts of the one before it, checksum and all."""

    def generate(self, requests: Sequence[Request], sampling: Sampling, *, capture: bool) -> list[Generation]:
        return [_shifted(answer) for answer in super().generate(requests, sampling, capture=capture)]


def _shifted(answer: Generation) -> Generation:
    return changed(answer, answer, rows_shifted(1))


def changed(answer: Generation, other: Generation, change: Corruption) -> Generation:
    """Return the answer with a changed record, checksum and all; `other`: an answer to another prompt."""
    if answer.routing is None or other.routing is None:
        return answer
    experts = np.ascontiguousarray(change(answer.routing.experts, other.routing.experts))
    experts.flags.writeable = False
    return replace(answer, routing=replace(answer.routing, experts=experts, crc32=checksum(experts, answer.tokens)))


class _LateBug(SglangEngine):
    """Is right up to step `SINCE`, so that one run shows both."""

    SINCE = 5
    version: WeightVersion = 0
    change: Corruption

    def load_weights(self, source: WeightSource, version: WeightVersion) -> None:
        super().load_weights(source, version)
        self.version = version

    def generate(self, requests: Sequence[Request], sampling: Sampling, *, capture: bool) -> list[Generation]:
        answers = list(super().generate(requests, sampling, capture=capture))
        if self.version < self.SINCE:
            return answers
        half = len(answers) // 2
        return [
            changed(answer, answers[(i + half) % len(answers)], type(self).change) for i, answer in enumerate(answers)
        ]


class LateShift(_LateBug):
    """From then on every token has the experts of the one before it."""

    change = staticmethod(rows_shifted(1))


class LateSwap(_LateBug):
    """From then on two layers have each other's experts."""

    change = staticmethod(layers_swapped(1, 2))


class LateForeign(_LateBug):
    """From then on every answer has the experts of an answer to another prompt."""

    change = staticmethod(foreign_rows)
