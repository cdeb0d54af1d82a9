"""Compact rows and their way into shared memory, with torch on a CPU and stand-ins of SGLang's objects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from r3.errors import RoutingError
from r3.rollout.provenance import KEY, from_bytes, unpack
from r3.rollout.segment import Owner, as_rows
from r3.rollout.sglang_plugin import hooks
from r3.rollout.sglang_plugin.returns import Returns
from r3.rollout.sglang_plugin.rows import RowStore, narrowed
from r3.rollout.sglang_plugin.tickets import TICKET_KEY, ticket_of
from r3.routing import expert_dtype
from tests.stand_in_scheduler import Answer, Scheduler

torch = pytest.importorskip("torch")
LAYERS, K, SLOTS = 3, 2, 40


def ids(rows: int, experts: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, experts, (rows, LAYERS, K)).astype(np.int32)


@pytest.mark.parametrize("experts", [2, 128, 255, 256, 257, 65_536])
def test_rows_come_out_as_they_went_in(experts: int) -> None:
    store, wide = RowStore(SLOTS, LAYERS, K, experts), ids(5, experts)
    wide[0, 0] = 0, experts - 1
    slots = np.array([7, 3, 39, 0, 8])
    store.put(slots, narrowed(torch.from_numpy(wide), experts).numpy())

    assert store.compact(slots).dtype == expert_dtype(experts)
    assert np.array_equal(store.compact(slots), wide)
    assert np.array_equal(store.stock(slots[::-1]), wide[::-1])
    assert store.compact(np.array([1])).tolist() == [[[0] * K] * LAYERS], "a slot that no pass has written reads 0"
    assert store.rows.nbytes == SLOTS * LAYERS * K * expert_dtype(experts).itemsize


def test_a_million_slots_of_the_30b_shape_take_less_than_0_4_gib() -> None:
    store = RowStore(1000, 48, 8, 128)
    assert store.rows.nbytes * 1000 < 0.4 * 2**30


@pytest.mark.parametrize(("experts", "wrong"), [(128, -1), (128, 300), (256, -1), (256, 256), (300, 65_536)])
def test_an_id_that_would_wrap_around_marks_its_pass_until_the_slot_is_written_again(experts: int, wrong: int) -> None:
    store, wide = RowStore(SLOTS, LAYERS, K, experts), ids(4, experts)
    slots = np.array([1, 2, 3, 4])
    wide[2, 1, 0] = wrong
    store.put(slots, narrowed(torch.from_numpy(wide), experts).numpy())
    assert not store.is_sound(slots[:1])
    assert (store.stock(slots) == -1).all(), "SGLang's own form must show it to whoever checks the range"

    store.put(slots[:3], narrowed(torch.from_numpy(ids(3, experts)), experts).numpy())
    assert store.take(slots, np.empty(4 * store.row_bytes, np.uint8)) == 1
    assert store.is_sound(slots[:3])


def test_a_pass_without_tokens_and_slots_outside() -> None:
    store = RowStore(SLOTS, LAYERS, K, 128)
    store.put(np.empty(0, np.int64), narrowed(torch.zeros((0, LAYERS, K), dtype=torch.int32), 128).numpy())
    assert store.compact(np.empty(0, np.int64)).shape == (0, LAYERS, K)
    with pytest.raises(IndexError, match="KV slots 3 to 40 of 40"):
        store.compact(np.array([3, 40]))


def filled(experts: int = 128) -> tuple[RowStore, np.ndarray]:
    store, wide = RowStore(SLOTS, LAYERS, K, experts), ids(SLOTS, experts)
    store.put(np.arange(SLOTS), narrowed(torch.from_numpy(wide), experts).numpy())
    return store, wide


def test_rows_arrive_in_shared_memory_with_what_is_said_of_them() -> None:
    (store, wide), owner = filled(), Owner(1 << 16)
    way = Returns(store, owner.path)
    slots = torch.tensor([5, 2, 30], dtype=torch.int32)
    ticket = way.submit(slots, 2, lambda found: bytes(found.tolist()))
    assert ticket is not None
    with pytest.raises(RoutingError, match="was not written within 0 s"):
        owner.take(ticket, 0)
    way.finish()
    taken = owner.take(ticket, 0)
    assert np.array_equal(as_rows(taken, np.uint8, (3, LAYERS, K)), wide[[5, 2, 30]])
    assert list(taken.trailer) == [5, 2, 30]


def test_rows_are_gathered_before_the_rows_of_a_later_pass_are_stored() -> None:
    (store, wide), owner = filled(), Owner(1 << 16)
    way = Returns(store, owner.path)
    table = torch.tensor([4, 5])
    launched_before = way.submitted
    first = way.submit(table, 0, None)
    launched_behind = way.submitted
    second = way.submit(torch.tensor([6]), 0, None)
    table[:] = 0  # SGLang gives the place in its table to the next request
    assert None not in (first, second)

    way.settle(launched_before)
    with pytest.raises(RoutingError, match="was not written within 0 s"):
        owner.take(first, 0)
    way.settle(launched_behind)
    store.put(np.array([4, 5]), narrowed(torch.zeros((2, LAYERS, K), dtype=torch.int32), 128).numpy())
    assert np.array_equal(as_rows(owner.take(first, 0), np.uint8, (2, LAYERS, K)), wide[[4, 5]])
    with pytest.raises(RoutingError, match="was not written within 0 s"):
        owner.take(second, 0)
    way.finish()
    assert np.array_equal(as_rows(owner.take(second, 0), np.uint8, (1, LAYERS, K)), wide[[6]])
    assert way.submitted == 2


def test_rows_of_a_bad_pass_are_not_returned() -> None:
    (store, wide), owner = filled(), Owner(1 << 16)
    wide[3, 0, 0] = -1
    store.put(np.array([3]), narrowed(torch.from_numpy(wide[3:4]), 128).numpy())
    way = Returns(store, owner.path)
    ticket = way.submit(torch.tensor([2, 3]), 0, None)
    way.finish()
    with pytest.raises(RoutingError, match=r"1 of 2 rows came from passes with an expert id outside \[0, 128\)"):
        owner.take(ticket, 0)


class Pending:
    """SGLang's pending capture output."""

    def __init__(self, slots: Any, wide: Any, host_cache: Any) -> None:
        self.out_cache_loc, self.topk, self.host_cache = slots, wide, host_cache

    def map_device_tensors(self, function: Any) -> None:
        self.out_cache_loc, self.topk = function(self.out_cache_loc), function(self.topk)


class Compact(Scheduler):
    """A scheduler whose rows the plugin keeps; a pass writes `fill` into every id of its slots."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, overlap: bool, **arguments: Any) -> None:
        super().__init__(overlap, **arguments)
        monkeypatch.setattr(hooks, "_answers", lambda: True)
        text = SimpleNamespace(num_experts=128)
        self.hooks.make_capturer(lambda *a: None, self.capturer, SimpleNamespace(hf_text_config=text))
        self.capturer.host_cache._log_allocation = lambda: None
        self.hooks.make_host_cache(pytest.fail, self.capturer.host_cache, 32, LAYERS, K, name="routed_experts")

    def launch(self, *slots: int, passes: int = 1, fill: int = 0) -> Any:
        wide = torch.tensor([fill, fill + 1], dtype=torch.int32).expand(len(slots), LAYERS, K)
        pending = Pending(torch.tensor(slots), wide, self.capturer.host_cache)
        pending.finalize = lambda: self.hooks.finalize(pytest.fail, pending)

        def forward(scheduler: Any) -> Any:
            found = self.hooks.on_forward_end(
                lambda *a, no_copy_to_cpu: pending, self.capturer, SimpleNamespace(), no_copy_to_cpu=self.overlap
            )
            assert (found is None) == (not self.overlap)
            return SimpleNamespace(pending=found)

        return self.hooks.run_batch(forward, self)

    def collect(self, request: Any) -> None:
        def original(processor: Any, request: Any) -> None:
            pool = SimpleNamespace(req_to_token=torch.tensor([request.slots]))
            request.routed_experts = self.hooks.get_topk(
                pytest.fail, self.capturer, req_pool_idx=0, seqlen=request.prompt + len(request.output_ids),
                req_to_token_pool=pool, start_len=0,
            )  # fmt: skip

        self.hooks.collect(original, None, request)


@pytest.fixture(autouse=True)
def every_capturer_is_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_captures_routing", lambda capturer: True)


def request(prompt: int, *slots: int) -> Answer:
    return Answer(
        prompt=prompt, slots=slots, output_ids=[], customized_info=None, routed_experts=None, return_routed_experts=True
    )


def play(engine: Compact) -> Answer:
    one = request(3, 5, 6, 7, 8, 9)
    engine.process(engine.launch(5, 6, 7, fill=10), one)
    engine.process(engine.launch(8, fill=20), one)
    engine.process(engine.launch(9, fill=30), one, finish=one)
    return one


ROWS = [10, 10, 10, 20, 30]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_client_that_takes_no_tickets_gets_sglangs_own_form(monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    one = play(Compact(monkeypatch, overlap))
    assert one.routed_experts.dtype == torch.int32
    assert one.routed_experts[:, 0, 0].tolist() == ROWS
    assert TICKET_KEY not in one.customized_info
    found = unpack({KEY: one.customized_info[KEY]}, 5, 3)
    assert found is not None
    assert (found.rows.tolist(), found.tokens.tolist()) == ([1, 1, 1, 2, 3], [1, 2, 3])


@pytest.mark.parametrize("overlap", [False, True])
def test_a_ticket_travels_and_its_record_has_rows_and_stamps(monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    owner, engine = Owner(1 << 16), Compact(monkeypatch, overlap)
    engine.hooks.switch_returns(engine, owner.path)
    one = play(engine)
    assert one.routed_experts is None
    assert len(one.customized_info[TICKET_KEY]) == 3
    ticket, begin, rows = ticket_of(one.customized_info) or pytest.fail("no ticket")
    other = request(2, 5, 6, 7)
    launched = engine.launch(5, 6, fill=40)  # the next request has some of its slots
    if overlap:
        with pytest.raises(RoutingError, match="was not written within 0 s"):
            owner.take(ticket, 0)
    engine.process(launched, other)
    taken = owner.take(ticket, 0)
    assert (begin, rows) == (0, 5)
    assert as_rows(taken, np.uint8, (5, LAYERS, K))[:, 0, 0].tolist() == ROWS
    found = from_bytes(taken.trailer, 5, 3)
    assert found is not None
    assert (found.rows.tolist(), found.tokens.tolist()) == ([1, 1, 1, 2, 3], [1, 2, 3])
    engine.hooks.switch_returns(engine, "")
    assert play(engine).routed_experts.dtype == torch.int32


def test_a_full_segment_sends_narrow_rows_with_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    owner, engine = Owner(64), Compact(monkeypatch, True)
    engine.hooks.switch_returns(engine, owner.path)
    one = play(engine)
    assert one.routed_experts.dtype == torch.uint8
    assert one.routed_experts[:, 0, 0].tolist() == ROWS
    assert set(one.customized_info) == {KEY}


def test_without_stamps_the_rows_come_back_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    owner, engine = Owner(1 << 16), Compact(monkeypatch, True)
    engine.hooks.switch(engine, False)
    engine.hooks.switch_returns(engine, owner.path)
    ticket, *_ = ticket_of(play(engine).customized_info) or pytest.fail("no ticket")
    engine.hooks.on_pause(lambda scheduler: None, engine)
    assert owner.take(ticket, 0).trailer == b""


def test_a_request_without_output_has_no_place_for_a_ticket(monkeypatch: pytest.MonkeyPatch) -> None:
    owner, engine = Owner(1 << 16), Compact(monkeypatch, False)
    engine.hooks.switch_returns(engine, owner.path)
    one = request(3, 5, 6, 7)
    engine.launch(5, 6, 7, fill=1)
    engine.collect(one)
    assert one.routed_experts[:, 0, 0].tolist() == [1, 1]
    assert one.customized_info is None


def test_layouts_that_it_cannot_follow_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Compact(monkeypatch, False, pp_size=2)
    with pytest.raises(RuntimeError, match="pp_size=2"):
        engine.hooks.switch_returns(engine, Owner(64).path)
    with pytest.raises(RuntimeError, match="captures no routing"):
        Scheduler(False).hooks.switch_returns(Scheduler(False), "anywhere")


def test_a_rank_that_answers_nobody_keeps_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_answers", lambda: False)
    engine = Scheduler(True)
    cache = engine.capturer.host_cache
    cache._log_allocation = lambda: None
    engine.hooks.make_capturer(
        lambda *a: None, engine.capturer, SimpleNamespace(hf_text_config=SimpleNamespace(num_experts=8))
    )
    engine.hooks.make_host_cache(pytest.fail, cache, 32, LAYERS, K, name="routed_experts")
    assert cache.buffer.numel() == 0
    assert engine.hooks.on_forward_end(pytest.fail, engine.capturer, SimpleNamespace()) is None
    assert engine.hooks.collect(pytest.fail, None, request(1)) is None
    engine.hooks.switch_returns(engine, "ranks are told alike")


def test_other_caches_and_models_that_say_nothing_are_left_alone() -> None:
    engine, made = Scheduler(False), []
    engine.hooks.make_capturer(lambda *a: None, None, SimpleNamespace(hf_text_config=SimpleNamespace()))
    for name in ("routed_experts", "indexer_topk"):
        engine.hooks.make_host_cache(lambda *a, **k: made.append(a[4]), SimpleNamespace(), 32, LAYERS, K, name)
    assert made == ["routed_experts", "indexer_topk"]


@pytest.mark.parametrize("value", [[[1]], [["x", 0, 0, 0]], 3])
def test_a_ticket_that_is_none(value: Any) -> None:
    with pytest.raises(RoutingError, match="no ticket of a record"):
        ticket_of({TICKET_KEY: value})
