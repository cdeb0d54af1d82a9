"""One copy a pass: the buffer holds what copying layer by layer leaves in it, whatever a pass does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from r3.rollout.sglang_plugin import onecopy
from r3.rollout.sglang_plugin.client import NOT_COMPARED
from r3.rollout.sglang_plugin.hooks import Hooks
from r3.rollout.sglang_plugin.ledger import Ledger
from r3.rollout.sglang_plugin.onecopy import OneCopy

TOKENS, LAYERS, K = 32, 6, 2
ALL = tuple(range(LAYERS))


class Engine:
    """Passes of a model over two buffers: `cache`, which the hook fills, and `expected`, filled layer by layer."""

    def __init__(self, layers: Sequence[int] = ALL, name: str = onecopy.NAME) -> None:
        self.copy, self.layers = OneCopy(), layers
        self.cache = SimpleNamespace(name=name, buffer=torch.full((TOKENS, LAYERS, K), -1, dtype=torch.int32))
        self.expected = self.cache.buffer.clone()
        self.random = torch.Generator().manual_seed(0)
        self.own_copies = 0

    def ids(self, tokens: int) -> torch.Tensor:
        return torch.randint(0, 1000, (tokens, K), dtype=torch.int32, generator=self.random)

    def router(self, layer: int, ids: torch.Tensor) -> None:
        self.expected[: len(ids), layer, :] = ids
        self.copy.capture(self.sglang, self.cache, layer, ids)

    def sglang(self, cache: Any, layer: int, ids: torch.Tensor) -> None:
        self.own_copies += 1
        cache.buffer[: len(ids), layer, :] = ids

    def run(self, tokens: int = 5, layers: Sequence[int] | None = None, ids: Callable[[int], Any] | None = None) -> int:
        """One pass; returns how many copies SGLang made in it."""
        before = self.own_copies
        for layer in self.layers if layers is None else layers:
            self.router(layer, (ids or self.ids)(tokens))
        self.copy.end_pass()
        return self.own_copies - before

    def is_right(self) -> bool:
        return torch.equal(self.cache.buffer, self.expected)


@pytest.mark.parametrize("layers", [ALL, (2, 3, 4, 5), (1, 3, 5), (4,)])
def test_after_the_first_pass_sglang_copies_nothing(layers: tuple[int, ...]) -> None:
    engine = Engine(layers)
    assert engine.run(TOKENS) == len(layers)
    for tokens in (7, 1, TOKENS, 7):
        assert engine.run(tokens) == 0
        assert engine.is_right()
    assert (engine.copy.layers, engine.copy.refusal) == (layers, None)


def test_a_pass_without_tokens_proves_nothing_and_does_no_harm() -> None:
    engine = Engine()
    assert engine.run(0) == LAYERS
    assert engine.run(3) == LAYERS, "the first pass with tokens is the one that is compared"
    assert [engine.run(0), engine.run(3)] == [0, 0]
    assert engine.is_right()


def refused(engine: Engine, reason: str) -> None:
    assert reason in (engine.copy.refusal or "")
    assert engine.run(9) == len(engine.layers)
    assert engine.is_right()


def test_ids_that_change_behind_the_router_are_copied_by_sglang() -> None:
    engine, kept = Engine(), []

    def remembered(tokens: int) -> torch.Tensor:
        kept.append(engine.ids(tokens))
        return kept[-1]

    engine.run(4, ids=remembered)
    kept[2][3, 1] += 1  # as a kernel does that marks tokens of other ranks in place
    engine.run(4)
    refused(engine, "changed after its router was done")


def test_layers_that_share_memory_are_copied_by_sglang() -> None:
    engine, place = Engine(), torch.zeros(4, K, dtype=torch.int32)
    engine.run(4, ids=lambda tokens: place)
    engine.run(4)
    refused(engine, "share the memory")


@pytest.mark.parametrize(("kind", "width", "reason"), [(torch.float32, K, "torch.float32"), (torch.int32, 3, "[4, 3]")])
def test_ids_that_the_buffer_does_not_take_are_left_to_sglang(kind: torch.dtype, width: int, reason: str) -> None:
    engine = Engine()
    for _ in range(2):
        for layer in ALL:
            engine.copy.capture(lambda *a: None, engine.cache, layer, torch.zeros(4, width, dtype=kind))
    assert reason in (engine.copy.refusal or "")


def test_wider_ids_are_converted_by_the_copy() -> None:
    engine = Engine()
    assert [engine.run(4, ids=lambda tokens: engine.ids(tokens).long()) for _ in range(3)] == [LAYERS, 0, 0]
    assert engine.is_right()


def test_a_pass_with_ids_of_another_type_is_copied_by_sglang() -> None:
    engine = Engine()
    engine.run()
    engine.run()
    kinds = iter((torch.int32, torch.int64, torch.int64, torch.int64, torch.int64, torch.int64))
    engine.run(4, ids=lambda tokens: engine.ids(tokens).to(next(kinds)))
    refused(engine, "came behind layers [0]")


def test_uneven_layers_are_copied_by_sglang() -> None:
    engine = Engine((0, 1, 3))
    engine.run()
    engine.run()
    refused(engine, "evenly spaced")


def test_two_batches_that_take_turns_are_copied_by_sglang() -> None:
    engine = Engine()
    for _ in range(2):
        engine.run(4, layers=[layer for layer in ALL for _ in range(2)])
        assert engine.is_right()
    refused(engine, "came behind layers")


@pytest.mark.parametrize("layers", [(0, 1, 2, 4, 5), (1, 2), (*ALL, 2), (0, 1, 2, 3, 4)])
def test_a_pass_that_is_not_as_the_first_leaves_the_right_rows(layers: tuple[int, ...]) -> None:
    engine = Engine()
    engine.run()
    engine.run()
    engine.run(8, layers=layers)
    engine.run(8)
    assert engine.is_right()
    assert engine.copy.refusal is not None


def test_a_pass_whose_layers_differ_in_tokens_is_copied_by_sglang() -> None:
    engine, sizes = Engine(), iter((4, 4, 3, 4, 4, 4))
    engine.run()
    engine.run(4, ids=lambda tokens: engine.ids(next(sizes)))
    refused(engine, "came behind layers [0, 1]")


def test_what_a_failed_pass_left_is_dropped() -> None:
    engine = Engine()
    engine.run()
    engine.router(0, engine.ids(4))
    engine.router(1, engine.ids(4))  # no end: the pass failed
    assert engine.run(4) == 0
    assert torch.equal(engine.cache.buffer[:4], engine.expected[:4])
    assert engine.copy.refusal is None


def test_other_caches_and_compilers_get_sglangs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(name="indexer")
    assert [engine.run() for _ in range(3)] == [LAYERS] * 3
    engine = Engine()
    engine.run()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert engine.run() == LAYERS
    assert engine.is_right()


class Graphs:
    """A GPU on which a graph may be under capture."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing = False
        monkeypatch.setattr(onecopy, "_in_graph", lambda ids: self.capturing)


def test_a_pass_inside_a_graph_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, graphs = Engine(), Graphs(monkeypatch)
    graphs.capturing = True
    assert [engine.run(), engine.run()] == [LAYERS, LAYERS]
    graphs.capturing = False
    assert engine.run() == LAYERS
    graphs.capturing = True
    assert engine.run() == LAYERS, "a comparison would wait for the device, which a capture may not"
    graphs.capturing = False
    assert [engine.run(), engine.run()] == [LAYERS, 0]
    graphs.capturing = True
    assert engine.run() == 0
    assert engine.is_right()


@pytest.mark.parametrize("ended", [False, True])
def test_a_graph_without_the_copy_is_an_error(monkeypatch: pytest.MonkeyPatch, ended: bool) -> None:
    engine, graphs = Engine(), Graphs(monkeypatch)
    engine.run()
    engine.run()
    graphs.capturing = True
    for layer in ALL[:-1]:
        engine.router(layer, engine.ids(4))
    graphs.capturing = False
    with pytest.raises(RuntimeError, match="without the copy of expert ids"):
        engine.copy.end_pass() if ended else engine.run()


def test_a_graph_that_goes_another_way_has_copies_of_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, graphs = Engine(), Graphs(monkeypatch)
    engine.run()
    engine.run()
    graphs.capturing = True
    for layer in (0, 1, 3, 4, 5):
        engine.router(layer, engine.ids(4))
    assert engine.is_right()
    assert engine.copy.refusal is not None


def test_the_plugin_copies_before_sglang_reads_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r3.rollout.sglang_plugin.hooks._captures_routing", lambda capturer: True)
    ledger = Ledger()
    engine, hooks = Engine(), Hooks(ledger)
    engine.copy, ledger.enabled = hooks._one_copy, False
    with pytest.raises(RuntimeError, match=NOT_COMPARED):
        hooks.require_one_copy()
    engine.run()
    engine.run()
    hooks.require_one_copy()
    for layer in ALL[:3]:
        ids = engine.ids(4)
        engine.expected[:4, layer] = ids
        hooks.capture(engine.sglang, engine.cache, layer_id=layer, topk_indices=ids)

    def read(*args: Any, **options: Any) -> str:
        assert engine.is_right()
        return "read"

    capturer = SimpleNamespace(host_cache=SimpleNamespace(num_tokens=32))
    assert hooks.on_forward_end(read, capturer, forward_batch=None) == "read"
    with pytest.raises(RuntimeError, match="a pass ended behind layers"):
        hooks.require_one_copy()
