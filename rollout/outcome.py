"""What the workers of one step's `generate` came to, put together: sums, the slowest, and handles of the batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from r3.rollout.reports import Dropped, Native, RolloutReport
from r3.transport import BatchRef
from r3.types import SampleFacts


@dataclass(frozen=True, slots=True)
class Rollout:
    """One step's samples. `facts` follow the order of the concatenated `batches`, handles of `r3.types.Batch`.

    `seconds`: the slowest worker's generation; `check_seconds`, `score_seconds`, `pack_seconds` likewise. Token counts
    are sums.
    """

    batches: tuple[BatchRef, ...]
    facts: tuple[SampleFacts, ...]
    dropped_samples: tuple[Dropped, ...]
    native_samples: tuple[Native, ...]
    seconds: float
    check_seconds: float
    score_seconds: float
    pack_seconds: float
    prompt_tokens: int
    response_tokens: int
    cached_tokens: int
    routing_bytes: int
    routing_rows: int
    stale_rows: int = 0

    @classmethod
    def of(cls, outcomes: Sequence[tuple[RolloutReport, BatchRef]]) -> Rollout:
        """Put together what every worker reports and the handle of its batch, in the order of the workers."""
        reports = [report for report, _ in outcomes]
        return cls(
            batches=tuple(batch for report, batch in outcomes if report.facts),
            facts=tuple(fact for report in reports for fact in report.facts),
            dropped_samples=tuple(sample for report in reports for sample in report.dropped),
            native_samples=tuple(sample for report in reports for sample in report.native),
            seconds=max(report.seconds for report in reports),
            check_seconds=max(report.check_seconds for report in reports),
            score_seconds=max(report.score_seconds for report in reports),
            pack_seconds=max(report.pack_seconds for report in reports),
            prompt_tokens=sum(report.prompt_tokens for report in reports),
            response_tokens=sum(report.response_tokens for report in reports),
            cached_tokens=sum(report.cached_tokens for report in reports),
            routing_bytes=sum(report.routing_bytes for report in reports),
            routing_rows=sum(report.routing_rows for report in reports),
            stale_rows=sum(report.stale_rows for report in reports),
        )

    @property
    def dropped(self) -> int:
        """Number of samples that are in no batch."""
        return len(self.dropped_samples)

    @property
    def rewards(self) -> NDArray[np.float32]:
        """Rewards `[n]` in the order of `facts`."""
        return np.array([fact.reward for fact in self.facts], dtype=np.float32)

    @property
    def groups(self) -> NDArray[np.int64]:
        """Group index `[n]` in the order of `facts`."""
        return np.array([fact.group for fact in self.facts], dtype=np.int64)
