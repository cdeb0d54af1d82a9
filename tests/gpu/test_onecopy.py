"""One copy a pass inside CUDA graphs: what replays leave in the buffer is what copies of every layer leave there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from r3.rollout.sglang_plugin.onecopy import NAME, OneCopy

pytestmark = pytest.mark.gpu

TOKENS, LAYERS, K, EXPERTS, HIDDEN = 64, 48, 8, 128, 256


class Model:
    """Routers over a hidden state that every layer changes; memory is freed and taken again between them."""

    def __init__(self) -> None:
        self.weights = torch.randn(LAYERS, HIDDEN, EXPERTS, device="cuda")
        self.mix = torch.randn(LAYERS, HIDDEN, HIDDEN, device="cuda") / HIDDEN**0.5
        self.copy, self.own_copies = OneCopy(), 0
        self.cache = SimpleNamespace(name=NAME, buffer=self.empty())
        self.expected = self.empty()

    def empty(self) -> torch.Tensor:
        return torch.full((TOKENS, LAYERS, K), -1, dtype=torch.int32, device="cuda")

    def sglang(self, cache: Any, layer: int, ids: torch.Tensor) -> None:
        self.own_copies += 1
        cache.buffer[: len(ids), layer, :] = ids

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in range(LAYERS):
            ids = (hidden @ self.weights[layer]).topk(K, dim=-1).indices.int()
            self.expected[: len(ids), layer, :] = ids
            self.copy.capture(self.sglang, self.cache, layer, ids)
            # What an expert layer takes and frees: without a hold on `ids`, the next one would lie where they were.
            del ids
            hidden = torch.tanh(hidden @ self.mix[layer])
            torch.full((len(hidden), K), -7, dtype=torch.int32, device="cuda")
        return hidden


@torch.inference_mode()
def test_replays_of_graphs_of_many_sizes_leave_the_rows_of_every_layer() -> None:
    model, pool, stream = Model(), torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    graphs: dict[int, tuple[Any, torch.Tensor]] = {}
    for size in (64, 40, 8, 1):
        hidden = torch.randn(size, HIDDEN, device="cuda")
        with torch.cuda.stream(stream):
            for _ in range(2):
                model.run(hidden)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            model.run(hidden)
        graphs[size] = (graph, hidden)
    assert model.copy.refusal is None
    assert model.own_copies == LAYERS, "the first pass alone, before the first graph"

    for size in (1, 64, 8, 40, 8, 64, 1):
        graph, hidden = graphs[size]
        hidden.copy_(torch.randn(size, HIDDEN, device="cuda"))
        graph.replay()
        model.copy.end_pass()
        assert torch.equal(model.cache.buffer, model.expected)
        assert model.cache.buffer[:size].min() >= 0
        model.run(torch.randn(24, HIDDEN, device="cuda"))  # a pass over prompts, without a graph
        model.copy.end_pass()
        assert torch.equal(model.cache.buffer, model.expected)
