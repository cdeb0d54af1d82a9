"""A microbatch's record on the device: what was uploaded, and the views of it that routers and counters take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from r3.audit import LAGS
from r3.metrics import AUDIT_WINDOWS
from r3.trainer.parallel import upload
from r3.trainer.sampling import AuditRows
from r3.trainer.use import RouterFault

# Bytes of int64 ids that one microbatch may hold; a larger one widens a layer at a time.
WIDE_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class AuditPairs:
    """The pairs of rows that an audit compares, all lags one after another; see `r3.trainer.sampling.AuditRows`.

    `own`, `record` int64 `[pairs]` are indices into a router's rows and `classes` float64 `[pairs, 6]` is one-hot over
    (lag, sampled), on the model's device. Those at lag 0 are `lag0`; `window` int64 is their window, on the device.
    `pairs` int64 `[3, 2]` and `window_pairs` int64 `[AUDIT_WINDOWS]` count the pairs, on the host.
    """

    own: torch.Tensor
    record: torch.Tensor
    classes: torch.Tensor
    lag0: slice
    window: torch.Tensor
    pairs: NDArray[np.int64]
    window_pairs: NDArray[np.int64]

    @classmethod
    def of(cls, rows: AuditRows, where: torch.device) -> AuditPairs:
        """Upload the rows of an audit."""
        sizes = [len(part) for part in rows.own]
        begins, zero = [0, *accumulate(sizes)], LAGS.index(0)
        kinds = np.repeat(np.arange(0, 2 * len(LAGS), 2), sizes) + np.concatenate(rows.sampled)
        # In one piece: on a GPU most of so small a copy is its call.
        parts = upload(np.concatenate([*rows.own, *rows.record, kinds, rows.window]), where)
        own, record, kind, window = parts.split([*3 * [begins[-1]], len(rows.window)])
        return cls(
            own=own,
            record=record,
            classes=(kind[:, None] == torch.arange(2 * len(LAGS), device=where)).double(),
            lag0=slice(begins[zero], begins[zero + 1]),
            window=window,
            pairs=np.bincount(kinds, minlength=2 * len(LAGS)).reshape(len(LAGS), 2),
            window_pairs=np.bincount(rows.window, minlength=AUDIT_WINDOWS),
        )


@dataclass(frozen=True, slots=True, eq=False)
class MicrobatchRouting:
    """What the routers of this rank need to know of one microbatch, on the model's device; `[b, s]` are its rows.

    `experts` `[b, s, layers, k]` of an unsigned integer dtype, the MoE layers of this rank's model in ascending order
    and with the engine's order inside a row, or None to leave the routing alone; `recorded` bool `[b, s]` marks the
    rows that have one (never a pad). With `force` those rows are replayed, otherwise they are only compared with the
    model's own choice. `pads` bool `[b, s]`. The rows of `audit`, made when they are first asked for and `audited` in
    number, are also compared with the record shifted by one row in both directions. `layers`, `fault` and `compare` are
    those of `r3.trainer.use.RoutingUse`; `own` collects the model's own choice, `[s * b, k]` by local MoE layer.
    `trace` keeps which rows differ in which layer. `choosing` int64 `[n]`: the rows, in the routers' order, that choose
    for themselves where the others are forced; needed with `force`.
    """

    experts: torch.Tensor | None
    recorded: torch.Tensor
    pads: torch.Tensor
    force: bool
    audit: Callable[[], AuditRows] | None = None
    audited: int = 0
    layers: tuple[int, ...] | None = None
    fault: RouterFault | None = None
    own: dict[int, torch.Tensor] | None = None
    trace: bool = False
    compare: bool = True
    choosing: torch.Tensor | None = None

    @property
    def watched(self) -> bool:
        """Whether the own choice of a row that is forced is looked at before it is counted."""
        return self.own is not None or self.fault is not None

    def forces(self, layer: int) -> bool:
        """Tell whether the record is forced in MoE layer `layer` (global index)."""
        return self.force and (self.layers is None or layer in self.layers)


class RoutedRecord:
    """The record in the order in which routers see their rows, made when it is first asked for.

    A backward pass that recomputes nothing never asks.
    """

    def __init__(self, routing: MicrobatchRouting) -> None:
        self._routing = routing
        self._recorded: torch.Tensor | None = None
        self._wide: torch.Tensor | None = None
        self._by_layer: tuple[torch.Tensor, ...] = ()

    @property
    def recorded(self) -> torch.Tensor:
        """Which rows have a record, bool `[s * b]`."""
        if self._recorded is None:
            self._recorded = router_order(self._routing.recorded)
        return self._recorded

    def ids(self, local: int) -> torch.Tensor:
        """Return the ids of one layer, int64 `[s * b, k]`; `local` counts the MoE layers of this rank."""
        if not self._by_layer:
            experts = self._experts
            if 8 * experts.numel() > WIDE_BYTES:
                return _widened(experts[:, :, local : local + 1])[0]
            self._wide = _widened(experts)
            self._by_layer = self._wide.unbind(0)
        return self._by_layer[local]

    def layers(self, begin: int, end: int) -> torch.Tensor:
        """Return the ids of consecutive layers, int64 `[layers, s * b, k]`."""
        return _widened(self._experts[:, :, begin:end]) if self._wide is None else self._wide[begin:end]

    @property
    def _experts(self) -> torch.Tensor:
        assert self._routing.experts is not None
        return self._routing.experts


def router_order(rows: torch.Tensor) -> torch.Tensor:
    """Bring rows `[b, s, ...]` into the order in which a router sees its tokens: `[s * b, ...]`, sequence first."""
    return rows.transpose(0, 1).reshape(-1, *rows.shape[2:])


def _widened(experts: torch.Tensor) -> torch.Tensor:
    b, s, layers, k = experts.shape
    # One copy that turns and widens; a reshape first would make another.
    wide = experts.permute(2, 1, 0, 3).to(torch.int64, memory_format=torch.contiguous_format)
    return wide.reshape(layers, s * b, k)
