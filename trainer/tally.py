"""Counters of one pass, kept on the device and brought to the host once, at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field

import numpy as np
import torch

from r3.errors import RoutingError
from r3.metrics import AUDIT_WINDOWS, RouterCounts
from r3.trainer import parallel
from r3.trainer.rows import RowClasses


@dataclass(slots=True, eq=False)
class Tally:
    """Sums over the router calls of one pass; see `RouterCounts` for their meaning.

    Per-layer counters have a place for every MoE layer of the model, of which a pipeline stage fills its own.
    `followed` int64 `[layers]`: rows for which the router really used every recorded id; `visits`: calls per layer;
    `differs`: for each microbatch, which rows differ in any of this rank's layers; `runs`: microbatches per model
    chunk; `flags`: for each microbatch and column, where asked for, which rows differ there; `seconds`: host time spent
    in replay.
    """

    disagree: torch.Tensor
    followed: torch.Tensor
    overlap: torch.Tensor
    overlap_pairs: torch.Tensor
    windows: torch.Tensor
    compared: torch.Tensor
    mismatched_ids: torch.Tensor
    visits: dict[int, int] = field(default_factory=dict)
    differs: dict[int, torch.Tensor] = field(default_factory=dict)
    runs: dict[int, int] = field(default_factory=dict)
    flags: dict[int, dict[int, torch.Tensor]] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def zero(cls, layers: int, device: torch.device) -> Tally:
        """Return empty counters for a model with that many MoE layers."""

        def count(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        overlap = torch.zeros(layers, 3, 2, dtype=torch.float64, device=device)
        windows = torch.zeros(AUDIT_WINDOWS, 2, dtype=torch.float64, device=device)
        return cls(count(layers), count(layers), overlap, count(layers, 3, 2), windows, count(), count())

    def finish_microbatch(
        self,
        chunk: int,
        differs: torch.Tensor,
        recorded: torch.Tensor,
        compared: bool,
        flags: Mapping[int, torch.Tensor],
    ) -> None:
        """Note that `chunk` ran its next microbatch, and which of its rows (router order) differ there.

        `flags`: the same by layer (column), empty where nobody asks for it.
        """
        index = self.runs.get(chunk, 0)
        self.runs[chunk] = index + 1
        self.flags.setdefault(index, {}).update(flags)
        if not compared:
            return
        if index not in self.differs:
            self.differs[index] = differs
            self.compared += recorded.sum()
        else:
            self.differs[index] = self.differs[index] | differs

    def require_all_visited(self, columns: Mapping[int, int], chunks: int) -> None:
        """Raise `RoutingError` unless every layer (`columns`: layer -> column) was routed once per microbatch."""
        if len(set(self.runs.values())) > 1 or len(self.runs) > chunks:
            raise RoutingError(
                f"the chunks of the model ran {self.runs} microbatches; every chunk must run each one once"
            )
        for layer, column in columns.items():
            found = self.visits.get(column, 0)
            if found != len(self.differs):
                raise RoutingError(
                    f"the router of layer {layer} was consulted {found} times in {len(self.differs)} microbatches"
                )

    def counts(self, rows: RowClasses) -> RouterCounts:
        """Join the counters of all ranks that share this rank's trajectories with what was known before the pass.

        Collective over those ranks; brings everything to the host in one synchronisation. Only the rank that stands for
        the others (`Place.reports`, first of its context group) gets the sums, the others get zeros.
        """
        where = parallel.place()
        flags = [self.differs[index] for index in sorted(self.differs)]
        anywhere = parallel.any_over_stages(torch.cat(flags)).sum() if flags else torch.zeros_like(self.compared)
        if where.stage != where.stages - 1:
            # Every stage compares the same rows.
            anywhere, self.compared = torch.zeros_like(anywhere), torch.zeros_like(self.compared)
        integers = (self.disagree, self.followed, self.overlap_pairs, anywhere, self.compared, self.mismatched_ids)
        local = torch.cat([tensor.reshape(-1).double() for tensor in (*integers, self.overlap, self.windows)])
        flat = parallel.sum_over_model(local).cpu().numpy()
        layers = len(self.disagree)
        if not where.reports or where.context:
            return RouterCounts.zero(layers)
        sizes = [layers, layers, 6 * layers, 3, 6 * layers]
        disagree, followed, pairs, scalars, overlap, windows = np.split(flat, np.cumsum(sizes))
        replayed = int(followed.min()) if layers else 0
        return RouterCounts(
            disagree=disagree.astype(np.int64),
            overlap=overlap.reshape(layers, 3, 2),
            overlap_pairs=pairs.astype(np.int64).reshape(layers, 3, 2),
            windows=windows.reshape(-1, 2),
            compared=int(scalars[1]),
            disagree_any=int(scalars[0]),
            mismatched_ids=int(scalars[2]),
            required=rows.required,
            replayed=replayed,
            native=rows.rows - replayed,
            missing=rows.missing,
            pads=rows.pads,
        )


def counts_over_ranks(counts: RouterCounts) -> RouterCounts:
    """Add the counters of all ranks; the same on every rank."""
    parts = [np.asarray(part, np.float64) for part in astuple(counts)]
    total = parallel.sum_over_ranks(np.concatenate([part.reshape(-1) for part in parts]))
    split = np.split(total, np.cumsum([part.size for part in parts])[:-1])
    shaped = [values.reshape(part.shape) for values, part in zip(split, parts, strict=True)]
    disagree, overlap, pairs, windows = shaped[:4]
    return RouterCounts(
        disagree.astype(np.int64), overlap, pairs.astype(np.int64), windows, *(int(part) for part in shaped[4:])
    )
