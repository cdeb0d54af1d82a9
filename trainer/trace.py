"""Which layers disagree about which token: kept for single tokens in the steps that ask for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from r3.tokens import Floats, Pass, SequenceFacts, TokenReport, observe
from r3.trainer import parallel
from r3.trainer.batching import MicroBatch, StepBatch
from r3.trainer.rows import Bools, Ints

# [microbatch][MoE layer of the model, as a column] -> bool [s * b], router order.
Flags = Mapping[int, Mapping[int, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Trace:
    """The rows behind this rank's response tokens, `targets` int64 `[n]` (`MicroBatch`), in one pass.

    `differs` bool `[n, layers]`: does the layer's own top-k set differ from the record; False for layers of other
    pipeline stages.
    """

    targets: Ints
    differs: Bools

    @classmethod
    def of(cls, flags: Flags, microbatches: Sequence[MicroBatch], layers: int) -> Trace:
        """Bring the flags of a pass to the host, for a model with that many MoE layers."""
        targets, differs = [np.empty(0, np.int64)], [np.empty((0, layers), np.bool_)]
        for index, microbatch in enumerate(microbatches):
            # Routers see the sequence first, then the batch.
            order = microbatch.routed_targets.T.reshape(-1)
            trained = order >= 0
            found = np.zeros((int(trained.sum()), layers), np.bool_)
            by_column = flags.get(index, {})
            if by_column:
                # In one piece: every copy to the host waits for the device.
                found[:, list(by_column)] = torch.stack(list(by_column.values())).cpu().numpy()[:, trained].T
            targets.append(order[trained])
            differs.append(found)
        return cls(np.concatenate(targets), np.concatenate(differs))

    def of_tokens(self, chosen: Ints) -> Bools:
        """Return `[chosen, layers]` over all ranks, the same on every one; `chosen` ascending. Collective."""
        places = np.searchsorted(chosen, self.targets)
        mine = (places < len(chosen)) & (chosen[np.minimum(places, len(chosen) - 1)] == self.targets)
        found = np.zeros((len(chosen), self.differs.shape[1]), np.float64)
        found[places[mine]] = self.differs[mine]
        return parallel.sum_over_ranks(found) > 0


@dataclass(frozen=True, slots=True)
class Traced:
    """A pass over the whole step that kept its trace; `logprobs` float64 `[T]` nats, the same on every rank."""

    logprobs: Floats
    trace: Trace | None

    @property
    def observed(self) -> Pass | None:
        """What `r3.tokens` needs of it."""
        return None if self.trace is None else Pass(self.logprobs, self.trace.of_tokens)


class TokenObserver:
    """Makes the `TokenReport` of a step on every rank; texts are decoded on rank 0 alone, whose report is kept.

    `directory`: the checkpoint, for its tokenizer; `worst`: `metrics.worst_tokens`.
    """

    def __init__(self, directory: Path, moe_layers: Sequence[int], worst: int, rank: int) -> None:
        self._directory, self._moe_layers, self._worst, self._rank = directory, moe_layers, worst, rank
        self._tokenizer: Any = None

    def report(self, number: int, step: StepBatch, train: Traced, native: Traced | None) -> TokenReport | None:
        """Return what step `number` keeps of its tokens, None where the pass kept no trace. Collective."""
        found = train.observed
        if found is None:
            return None
        facts = [
            SequenceFacts(one.group, one.member, float(one.reward), one.finish, one.prompt_len, one.tokens)
            for one in step.trajectories
        ]
        rollout = step.rollout_logprobs.astype(np.float64)
        other = native.observed if native else None
        return observe(number, facts, rollout, found, other, self._moe_layers, self._decode, worst=self._worst)

    def _decode(self, ids: Sequence[int]) -> str:
        if self._rank:
            return ""
        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(self._directory)
        return str(self._tokenizer.decode(list(ids)))
