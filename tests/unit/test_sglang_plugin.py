"""The plugin's hooks around stand-ins of SGLang's objects: which number lands where, in which order of events."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from r3.errors import ConfigError
from r3.rollout.provenance import KEY, Weights, unpack
from r3.rollout.sglang_plugin import client, hooks, plugin
from r3.rollout.sglang_plugin.hooks import Hooks
from r3.rollout.sglang_plugin.ledger import Ledger
from r3.rollout.sglang_plugin.plugin import Point

NEUTRAL = {"weight_version": "4", "disaggregation_mode": "null", "pp_size": 1, "speculative_algorithm": None}


class Slots:
    """A tensor, as far as the hooks look at one."""

    def __init__(self, *values: int) -> None:
        self.values = np.array(values, dtype=np.int64)

    def cpu(self) -> Slots:
        return self

    def numpy(self) -> np.ndarray:
        return self.values

    def __getitem__(self, where: slice) -> Slots:
        return Slots(*self.values[where].tolist())


class Pending:
    def __init__(self, slots: Slots) -> None:
        self.out_cache_loc = slots
        self.host_cache = SimpleNamespace(num_tokens=32)


class Scheduler:
    """One request, passes over its slots, with or without overlap."""

    def __init__(self, overlap: bool, **arguments: Any) -> None:
        self.ledger = Ledger()
        self.hooks = Hooks(self.ledger)
        self.server_args = SimpleNamespace(**(NEUTRAL | arguments))
        self.capturer = SimpleNamespace(host_cache=SimpleNamespace(num_tokens=32))
        self.overlap = overlap

    def launch(self, *slots: int, passes: int = 1) -> Any:
        """A scheduler step; returns the batch's result."""

        def forward(scheduler: Any) -> Any:
            pending = None
            for _ in range(passes):
                batch = SimpleNamespace(out_cache_loc=Slots(*slots))
                pending = self.hooks.on_forward_end(
                    lambda capturer, forward_batch: Pending(forward_batch.out_cache_loc) if self.overlap else None,
                    self.capturer, forward_batch=batch,
                )  # fmt: skip
            return SimpleNamespace(pending=pending)

        return self.hooks.run_batch(forward, self)

    def process(self, result: Any, *requests: Any, finish: Any = None) -> None:
        """The result of a step arrives: rows are written, tokens are committed, a request may finish."""

        def original(processor: Any, batch: Any, result: Any) -> None:
            if result.pending is not None:
                self.hooks.finalize(lambda pending: None, result.pending)
            for request in batch.reqs:
                request.output_ids.append(9)
            if finish is not None:
                self.collect(finish)

        self.hooks.process_result(original, None, SimpleNamespace(reqs=list(requests)), result)

    def collect(self, request: Any) -> None:
        def original(processor: Any, request: Any) -> None:
            pool = SimpleNamespace(req_to_token={0: Slots(*request.slots)})
            length = request.prompt + len(request.output_ids)
            self.hooks.get_topk(
                lambda *a, **k: "rows", self.capturer, req_pool_idx=0, seqlen=length, req_to_token_pool=pool
            )
            request.routed_experts = "rows"

        self.hooks.collect(original, None, request)


@pytest.fixture(autouse=True)
def every_capturer_is_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_captures_routing", lambda capturer: True)


class Answer(SimpleNamespace):
    """A request of SGLang."""

    @property
    def output_ids_through_stop(self) -> list[int]:
        return self.output_ids


def answer(prompt: int, *slots: int) -> Answer:
    return Answer(
        prompt=prompt, slots=slots, output_ids=[], customized_info=None, routed_experts=None, return_routed_experts=True
    )


def stamps(one: Answer) -> tuple[list[int], list[int], tuple[Weights, ...]]:
    values = one.customized_info[KEY]
    assert len(values) == len(one.output_ids)
    found = unpack({KEY: values}, one.prompt + len(one.output_ids) - 1, len(one.output_ids))
    assert found is not None
    return found.rows.tolist(), found.tokens.tolist(), found.weights


@pytest.mark.parametrize("overlap", [False, True])
def test_rows_and_tokens_carry_the_number_of_their_pass(overlap: bool) -> None:
    engine, one = Scheduler(overlap), answer(3, 5, 6, 7, 8, 9)
    for slots in ((5, 6, 7), (8,)):
        engine.process(engine.launch(*slots), one)
    engine.process(engine.launch(9), one, finish=one)

    assert stamps(one) == ([1, 1, 1, 2, 3], [1, 2, 3], (Weights(1, "4", 0),))


def test_a_pass_that_is_under_way_does_not_take_the_rows_of_the_one_before() -> None:
    # Overlap: pass 2 starts, and is numbered, before the rows of pass 1 are written; pass 3 before those of pass 2.
    engine, one = Scheduler(True), answer(2, 5, 6, 7, 8)
    first = engine.launch(5, 6)
    second = engine.launch(7)
    engine.process(first, one)
    engine.process(second, one)
    third = engine.launch(8)
    overshoot = engine.launch(9)
    engine.process(third, one, finish=one)
    assert stamps(one)[:2] == ([1, 1, 2, 3], [1, 2, 3])
    engine.process(overshoot)
    assert engine.ledger.stamps_of(np.array([8, 9])).tolist() == [3, 4]


def test_a_slot_that_is_used_again_has_its_last_writer() -> None:
    engine, one, other = Scheduler(True), answer(2, 5, 6), answer(2, 5, 6)
    engine.process(engine.launch(5, 6), one)
    engine.process(engine.launch(5, 6), other, finish=other)
    assert stamps(other)[0] == [2, 2]


def test_weights_are_those_of_the_start_of_the_pass() -> None:
    engine, one = Scheduler(True), answer(2, 5, 6, 7)
    first = engine.launch(5, 6)

    def update(success: bool, version: str | None) -> None:
        outcome = SimpleNamespace(success=success, message="")
        engine.hooks.update_weights(lambda *a: outcome, None, SimpleNamespace(weight_version=version))

    update(True, None)
    update(True, "5")
    engine.process(first, one)
    engine.process(engine.launch(7), one, finish=one)
    assert stamps(one)[2] == (Weights(1, "4", 0), Weights(2, "5", 2))

    update(False, "6")
    engine.launch(9)
    assert engine.ledger.weights[-1] == Weights(3, "5", 3), "a failed update may have changed some tensors"
    engine.hooks.relabel_weights(lambda *a: None, engine, "7")
    engine.launch(9)
    assert engine.ledger.weights[-1] == Weights(4, "7", 3)


def test_an_update_whose_flush_was_refused_has_new_weights() -> None:
    outcome = SimpleNamespace(success=False, message="Weights were updated, but the cache was not flushed")
    assert hooks.outcome_succeeded(outcome)


@pytest.mark.parametrize("passes", [0, 2])
def test_a_step_that_is_not_one_pass_gives_no_stamps(passes: int) -> None:
    engine, one = Scheduler(False), answer(2, 5, 6)
    engine.process(engine.launch(5, 6, passes=passes), one, finish=one)
    assert one.customized_info is None


def test_values_of_others_in_the_same_field_stay() -> None:
    engine, one = Scheduler(False), answer(1, 5)
    one.customized_info = {"theirs": [1]}
    engine.process(engine.launch(5), one, finish=one)
    assert set(one.customized_info) == {"theirs", KEY}


def test_switched_off_it_leaves_no_trace() -> None:
    engine, one = Scheduler(False), answer(2, 5, 6)
    engine.hooks.switch(engine, False)
    engine.process(engine.launch(5, 6), one, finish=one)
    assert (one.customized_info, engine.ledger.forward) == (None, 0)


UNSUPPORTED = {
    "disaggregation_mode": "decode", "enable_hierarchical_cache": True, "enable_lmcache": True, "enable_hisparse": True,
    "enable_pdmux": True, "enable_two_batch_overlap": True, "speculative_algorithm": "EAGLE", "dllm_algorithm": "x",
    "pp_size": 2,
}  # fmt: skip


def test_every_unsupported_layout_is_tried() -> None:
    assert set(UNSUPPORTED) == set(hooks.UNSUPPORTED)


@pytest.mark.parametrize(("name", "value"), UNSUPPORTED.items())
def test_layouts_that_it_cannot_follow_stamp_nothing_and_say_so_once(
    name: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    engine, one = Scheduler(False, **{name: value}), answer(2, 5, 6)
    with caplog.at_level(logging.WARNING):
        engine.process(engine.launch(5, 6), one)
        engine.process(engine.launch(7), one, finish=one)
    assert one.customized_info is None
    (line,) = caplog.messages
    assert f"{name}={value!r}" in line
    with pytest.raises(RuntimeError, match=name):
        engine.hooks.switch(engine, True)


def test_releases_and_internals_that_differ_are_named() -> None:
    assert "0.5.24" in (plugin.unfit("0.5.24") or "")
    assert plugin._misfit(Point("json.JSONDecoder.decode", "", ("self", "s"))) is None
    assert "expected ('self', 'text')" in (plugin._misfit(Point("json.JSONDecoder.decode", "", ("self", "text"))) or "")
    assert "json.JSONDecoder.gone does not exist" in (plugin._misfit(Point("json.JSONDecoder.gone", "", ())) or "")
    assert plugin._misfit(Point("json.JSONDecoder.gone", "", (), optional=True)) is None
    gone = [Point("json.JSONDecoder.gone", "", ())]
    assert (plugin.unfit("0.5.23", gone) or "").startswith("SGLang 0.5.23: json.JSONDecoder.gone does not exist")


class Engine:
    def __init__(self, refusal: str | None = None) -> None:
        self.refusal, self.calls = refusal, []

    def collective_rpc(self, method: str, **options: Any) -> None:
        self.calls.append((method, options))
        if self.refusal is not None:
            raise AssertionError(self.refusal)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    monkeypatch.setattr(client, "entry_points", lambda group: [SimpleNamespace(name="r3_provenance")])


def test_what_the_records_will_say(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, refusing = Engine(), Engine("pp_size=2: rows of a KV slot ...")
    assert client.switch(engine, "auto") == ("exact", "")
    assert client.switch(engine, "require") == ("exact", "")
    assert client.switch(engine, "off") == ("unknown", "routing.provenance is off")
    assert [options["enabled"] for _, options in engine.calls] == [True, True, False]
    assert client.switch(refusing, "auto") == (
        "unknown", "the plugin r3_provenance does not stamp: pp_size=2: rows of a KV slot ...",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"routing.provenance is require, but .*pp_size=2"):
        client.switch(refusing, "require")

    monkeypatch.setenv("SGLANG_PLUGINS", "r3_cpu")
    assert "leaves the plugin r3_provenance out" in client.switch(engine, "auto")[1]
    monkeypatch.delenv("SGLANG_PLUGINS")
    monkeypatch.setattr(client, "entry_points", lambda group: [])
    with pytest.raises(ConfigError, match="not registered; install this package"):
        client.switch(engine, "require")
    assert len(engine.calls) == 3, "an engine without the plugin is not asked"
