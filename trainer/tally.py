"""Counters of one pass, kept on the device and brought to the host once, at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from r3.errors import RoutingError
from r3.metrics import RouterCounts
from r3.trainer.rows import RowClasses


@dataclass(slots=True, eq=False)
class Tally:
    """Sums over the router calls of one pass; see `RouterCounts` for their meaning.

    `followed` int64 `[layers]`: rows for which the router really used every recorded id; `visits`: calls per layer;
    `seconds`: host time spent in replay.
    """

    disagree: torch.Tensor
    followed: torch.Tensor
    overlap: torch.Tensor
    overlap_pairs: torch.Tensor
    disagree_any: torch.Tensor
    compared: torch.Tensor
    mismatched_ids: torch.Tensor
    visits: dict[int, int] = field(default_factory=dict)
    microbatches: int = 0
    seconds: float = 0.0

    @classmethod
    def zero(cls, layers: int, device: torch.device) -> Tally:
        """Return empty counters for a model with that many MoE layers."""

        def count(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        overlap = torch.zeros(3, dtype=torch.float64, device=device)
        return cls(count(layers), count(layers), overlap, count(3), count(), count(), count())

    def require_all_visited(self, columns: Mapping[int, int]) -> None:
        """Raise `RoutingError` unless every layer (`columns`: layer -> column) was routed once per microbatch."""
        for layer, column in columns.items():
            found = self.visits.get(column, 0)
            if found != self.microbatches:
                raise RoutingError(
                    f"the router of layer {layer} was consulted {found} times in {self.microbatches} microbatches"
                )

    def counts(self, rows: RowClasses) -> RouterCounts:
        """Bring everything to the host (one synchronisation) and join it with what was known before the pass."""
        integers = (
            self.disagree,
            self.followed,
            self.overlap_pairs,
            self.disagree_any,
            self.compared,
            self.mismatched_ids,
        )
        flat = torch.cat([tensor.reshape(-1).double() for tensor in (*integers, self.overlap)]).cpu().numpy()
        layers = len(self.disagree)
        disagree, followed, pairs, scalars, overlap = np.split(flat, np.cumsum([layers, layers, 3, 3]))
        replayed = int(followed.min()) if layers else 0
        return RouterCounts(
            disagree=disagree.astype(np.int64),
            overlap=overlap,
            overlap_pairs=pairs.astype(np.int64),
            compared=int(scalars[1]),
            disagree_any=int(scalars[0]),
            mismatched_ids=int(scalars[2]),
            required=rows.required,
            replayed=replayed,
            native=rows.rows - replayed,
            missing=rows.missing,
            pads=rows.pads,
        )
