"""Counters of one pass, kept on the device and brought to the host once, at its end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from r3.errors import RoutingError
from r3.metrics import AUDIT_WINDOWS, RouterCounts
from r3.trainer import parallel
from r3.trainer.rows import RowClasses
from r3.types import ModelSpec


@dataclass(slots=True, eq=False)
class Tally:
    """Sums over the router calls of one pass; see `RouterCounts` for their meaning.

    Per-layer counters have a place for every MoE layer of the model, of which a pipeline stage fills its own.
    `followed` int64 `[layers]`: rows for which the router really used every recorded id; `loads` `[layers, experts]`:
    how often the record chose each expert, in a pass that compares the own choice with it; `overlap` `[layers, 3, 2]`
    and `windows` `[AUDIT_WINDOWS]`: ids shared by the audited pairs, in float64; `repeated`: recorded rows of a layer
    that name an expert twice, counted where `loads` are; `overlap_pairs`, `window_pairs`: the number of pairs, which
    the host knows; `visits`: calls per layer; `routed`: the microbatches that had a record;
    for each microbatch that was compared, in the routers' order, `recorded`: which rows have a record, and `differs`:
    which of them differ in any of this rank's layers, absent where it has none; `runs`: microbatches per model chunk;
    `flags`: for each microbatch and column, where asked for, which rows differ there;
    `seconds`: host time spent in replay.
    """

    top_k: int
    disagree: torch.Tensor
    followed: torch.Tensor
    loads: torch.Tensor
    overlap: torch.Tensor
    windows: torch.Tensor
    mismatched_ids: torch.Tensor
    repeated: torch.Tensor
    overlap_pairs: NDArray[np.int64]
    window_pairs: NDArray[np.int64]
    visits: dict[int, int] = field(default_factory=dict)
    recorded: dict[int, torch.Tensor] = field(default_factory=dict)
    differs: dict[int, torch.Tensor] = field(default_factory=dict)
    runs: dict[int, int] = field(default_factory=dict)
    routed: set[int] = field(default_factory=set)
    flags: dict[int, dict[int, torch.Tensor]] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def zero(cls, spec: ModelSpec, device: torch.device) -> Tally:
        """Return empty counters for a model."""
        layers = len(spec.moe_layers)

        def count(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        return cls(
            top_k=spec.top_k,
            disagree=count(layers),
            followed=count(layers),
            loads=count(layers, spec.num_experts),
            overlap=count(layers, 3, 2).double(),
            windows=count(AUDIT_WINDOWS).double(),
            mismatched_ids=count(),
            repeated=count(),
            overlap_pairs=np.zeros((layers, 3, 2), np.int64),
            window_pairs=np.zeros(AUDIT_WINDOWS, np.int64),
        )

    def spent_since(self, begin: float) -> None:
        """Count the host time since `begin` (`time.perf_counter()`) as replay's own."""
        self.seconds += time.perf_counter() - begin

    @property
    def compared(self) -> torch.Tensor:
        """How many rows were compared, int64 scalar."""
        return torch.cat([*self.recorded.values(), torch.zeros_like(self.repeated[None], dtype=torch.bool)]).sum()

    def finish_microbatch(self, chunk: int, routed: bool) -> None:
        """Note that `chunk` ran its next microbatch, with a record if `routed`."""
        index = self.runs.get(chunk, 0)
        self.runs[chunk] = index + 1
        if routed:
            self.routed.add(index)

    def note_differences(self, index: int, differs: torch.Tensor, flags: Mapping[int, torch.Tensor]) -> None:
        """Note which rows of microbatch `index` (router order) differ in some layers.

        `flags`: the same by layer (column), empty where nobody asks for it.
        """
        self.flags.setdefault(index, {}).update(flags)
        before = self.differs.get(index)
        self.differs[index] = differs if before is None else before | differs

    def require_all_visited(self, columns: Mapping[int, int], chunks: int) -> None:
        """Raise `RoutingError` unless every layer (`columns`: layer -> column) was routed once per microbatch."""
        if len(set(self.runs.values())) > 1 or len(self.runs) > chunks:
            raise RoutingError(
                f"the chunks of the model ran {self.runs} microbatches; every chunk must run each one once"
            )
        for layer, column in columns.items():
            found = self.visits.get(column, 0)
            if found != len(self.routed):
                raise RoutingError(
                    f"the router of layer {layer} was consulted {found} times in {len(self.routed)} microbatches"
                )

    def counts(self, rows: RowClasses) -> RouterCounts:
        """Join the counters of all ranks that share this rank's trajectories with what was known before the pass.

        Collective over those ranks; brings everything to the host in one synchronisation. Only the rank that stands for
        the others (`Place.reports`, first of its context group) gets the sums, the others get zeros. Raises
        `RoutingError` on a rank whose records name an expert twice in a row.
        """
        where = parallel.place()
        anywhere, compared = self._differing(), self.compared
        if where.stage != where.stages - 1:
            # Every stage compares the same rows.
            anywhere, compared = torch.zeros_like(anywhere), torch.zeros_like(compared)
        pairs = np.concatenate([self.overlap_pairs.reshape(-1), self.window_pairs]).astype(np.float64)
        scalars = torch.stack([anywhere, compared, self.mismatched_ids, self.repeated])
        found = (self.disagree, self.followed, self.loads, scalars, self.overlap, self.windows)
        parts = [tensor.reshape(-1).double() for tensor in found]
        local = torch.cat([*parts, parallel.upload(pairs, self.disagree.device)])
        flat = parallel.sum_over_model(local).cpu().numpy()
        layers, experts = self.loads.shape
        sizes = [layers, layers, layers * experts, 4, 6 * layers, AUDIT_WINDOWS, 6 * layers]
        split = np.split(flat, np.cumsum(sizes))
        disagree, followed, loads, totals, overlap, windows, overlap_pairs, window_pairs = split
        # The rank that has the record knows its name.
        if totals[3] and (here := int(self.repeated)):
            raise RoutingError(f"{here} recorded (row, layer) pairs on this rank name an expert twice")
        if not where.reports or where.context:
            return RouterCounts.zero(layers, experts)
        replayed = int(followed.min()) if layers else 0
        # A dense model has no top-k, and nothing to divide.
        k = max(self.top_k, 1)
        return RouterCounts(
            disagree=disagree.astype(np.int64),
            overlap=overlap.reshape(layers, 3, 2) / k,
            overlap_pairs=overlap_pairs.astype(np.int64).reshape(layers, 3, 2),
            windows=np.stack([windows / k, window_pairs], 1),
            loads=loads.astype(np.int64).reshape(layers, experts),
            compared=int(totals[1]),
            disagree_any=int(totals[0]),
            mismatched_ids=int(totals[2]),
            required=rows.required,
            replayed=replayed,
            native=rows.rows - replayed,
            missing=rows.missing,
            pads=rows.pads,
        )

    def _differing(self) -> torch.Tensor:
        """Return how many rows differ in any layer of any stage, int64 scalar. Collective over the stages."""
        rows = [self.differs.get(index, torch.zeros_like(self.recorded[index])) for index in sorted(self.recorded)]
        return parallel.any_over_stages(torch.cat(rows)).sum() if rows else torch.zeros_like(self.repeated)


def counts_over_ranks(counts: RouterCounts) -> RouterCounts:
    """Add the counters of all ranks; the same on every rank."""
    parts = [np.asarray(part) for part in astuple(counts)]
    total = parallel.sum_over_ranks(np.concatenate([part.reshape(-1).astype(np.float64) for part in parts]))
    split = np.split(total, np.cumsum([part.size for part in parts])[:-1])
    joined: list[Any] = [
        values.reshape(part.shape).astype(part.dtype) for values, part in zip(split, parts, strict=True)
    ]
    return RouterCounts(*(part if part.ndim else part.item() for part in joined))
