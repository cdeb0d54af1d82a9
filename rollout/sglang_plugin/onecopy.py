"""One copy a pass: the ids of all MoE layers reach SGLang's device buffer together.

SGLang copies the ids of every layer with a kernel of its own: 48 launches in each pass of a model of 48 layers, also
where nobody asks for routing. Here a layer's ids are kept where its router left them, and one kernel behind the last
layer's router copies them all.

Why the ids are the same: a tensor that is kept is not freed, so its memory serves nobody else before the copy, inside a
CUDA graph as outside. That nobody writes into it either is looked at and not assumed. The first pass goes layer by
layer, as SGLang has it, and its buffer is compared with the kept tensors when the next pass begins. Where they differ,
where layers share memory, or where layers do not come one behind the other, all stays as SGLang has it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

logger = logging.getLogger(__name__)

NAME = "routed_experts"

Capture = Callable[[Any, int, torch.Tensor], None]


class OneCopy:
    """Keeps the ids of a pass; used around `BaseDeviceCache.capture`, whose buffer is `[tokens, layers, k]`.

    `layers`: the layers whose ids it copies, none before a pass was compared. `refusal`: why it copies none and never
    will, None while it may.
    """

    def __init__(self) -> None:
        self.layers: tuple[int, ...] = ()
        self.refusal: str | None = None
        self._buffer = torch.empty(0)
        self._seen: list[int] = []
        self._kept: list[torch.Tensor] = []
        self._in_graph = False

    def capture(self, original: Capture, cache: Any, layer_id: int, ids: torch.Tensor) -> None:
        """Keep a layer's ids `[tokens, k]`, and copy all behind the last layer's; copy each at once in the first pass.

        Raises `RuntimeError` where a CUDA graph was captured that lacks the copy.
        """
        # Under a compiler SGLang's own copy is part of the graph, and a list of ours would not be.
        if torch.compiler.is_compiling() or self.refusal is not None or cache.name != NAME:
            original(cache, layer_id, ids)
            return
        if not self._seen or layer_id <= self._seen[-1]:
            self._begin_pass(cache.buffer, ids)
        if self.layers and not self._is_next(layer_id, ids):
            self._refuse(f"layer {layer_id} with ids {list(ids.shape)} came behind layers {self._seen}")
        if not self.layers:
            original(cache, layer_id, ids)
        if self.refusal is None and (self.layers or not self._in_graph):
            self._seen.append(layer_id)
            self._kept.append(ids)
        if self.layers and self._kept and layer_id == self.layers[-1]:
            torch.stack(self._kept, dim=1, out=self._rows(self.layers))
            self._kept = []

    def end_pass(self) -> None:
        """Copy what a pass left that ended before its last layer; `RuntimeError` where a CUDA graph lacks that copy."""
        if self.layers and self._kept:
            self._require_whole_graph()
            self._refuse(f"a pass ended behind layers {self._seen} of {list(self.layers)}")

    def _begin_pass(self, buffer: torch.Tensor, ids: torch.Tensor) -> None:
        in_graph = _in_graph(ids)
        if self.layers:
            self._require_whole_graph()  # what a failed pass left outside a graph is nobody's
        elif self._kept and not in_graph:
            self._judge()
        self._seen, self._kept, self._buffer, self._in_graph = [], [], buffer, in_graph

    def _judge(self) -> None:
        """Compare the buffer, which SGLang filled layer by layer, with what was kept of the pass that is over."""
        fault = _fault(self._seen, self._kept, self._buffer)
        if fault is None and not (torch.stack(self._kept, dim=1) == self._rows(self._seen)).all():
            fault = "ids of a layer changed after its router was done"
        if fault is not None:
            self._kept = []
            self._refuse(fault)
        elif len(self._kept[0]):
            self.layers = tuple(self._seen)
            logger.info("r3_provenance: the ids of %d layers are copied once a pass", len(self.layers))

    def _is_next(self, layer_id: int, ids: torch.Tensor) -> bool:
        at = len(self._kept)
        first = self._kept[0] if self._kept else ids
        return at < len(self.layers) and layer_id == self.layers[at] and _fits(ids, first, self._buffer)

    def _rows(self, layers: Sequence[int]) -> torch.Tensor:
        step = layers[1] - layers[0] if len(layers) > 1 else 1
        return self._buffer[: len(self._kept[0]), layers[0] : layers[-1] + 1 : step]

    def _refuse(self, reason: str) -> None:
        """Copy what is kept layer by layer, as part of a graph that is under capture, and leave the rest to SGLang."""
        for layer, ids in zip(self._seen, self._kept, strict=False):
            self._buffer[: len(ids), layer, :] = ids
        self._kept, self.layers, self.refusal = [], (), reason
        logger.info("r3_provenance: the ids of every layer are copied on their own: %s", reason)

    def _require_whole_graph(self) -> None:
        if self._kept and self._in_graph:
            raise RuntimeError(
                f"a CUDA graph was captured without the copy of expert ids: its pass ended behind layers {self._seen} "
                f"of {list(self.layers)}; start the engine without the plugin r3_provenance (SGLANG_PLUGINS)"
            )


def _in_graph(ids: torch.Tensor) -> bool:
    return bool(ids.is_cuda and torch.cuda.is_current_stream_capturing())


def _fits(ids: torch.Tensor, first: torch.Tensor, buffer: torch.Tensor) -> bool:
    # Where the types differ (int64 of a CPU), the copy converts them, as SGLang's does.
    is_whole = not ids.dtype.is_floating_point
    return is_whole and ids.shape == (len(first), buffer.shape[2]) and ids.dtype == first.dtype


def _fault(layers: Sequence[int], kept: Sequence[torch.Tensor], buffer: torch.Tensor) -> str | None:
    """Return why the ids of these layers cannot be copied at once, None when they can."""
    if len({b - a for a, b in pairwise(layers)}) > 1:
        return f"layers {list(layers)} are not evenly spaced"
    for layer, ids in zip(layers, kept, strict=True):
        if not _fits(ids, kept[0], buffer):
            found = f"{list(ids.shape)} of {ids.dtype}, the first {list(kept[0].shape)} of {kept[0].dtype}"
            return f"layer {layer} has ids {found}, and the buffer's rows are {list(buffer.shape[1:])}"
    if len(kept[0]) and len({ids.data_ptr() for ids in kept}) < len(kept):
        return "layers share the memory of their ids"
    return None
