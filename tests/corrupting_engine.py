"""Real SGLang whose records are well formed and wrong, for `rollout.engine`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from r3.rollout.engine import Generation, Request, Sampling
from r3.rollout.engines.sglang import SglangEngine
from r3.routing import checksum


class ShiftedRows(SglangEngine):
    """Gives every token the experts of the one before it, checksum and all."""

    def generate(self, requests: Sequence[Request], sampling: Sampling, *, capture: bool) -> list[Generation]:
        return [_shifted(answer) for answer in super().generate(requests, sampling, capture=capture)]


def _shifted(answer: Generation) -> Generation:
    if answer.routing is None:
        return answer
    experts = np.roll(answer.routing.experts, 1, axis=0)
    experts.flags.writeable = False
    return replace(answer, routing=replace(answer.routing, experts=experts, crc32=checksum(experts, answer.tokens)))
