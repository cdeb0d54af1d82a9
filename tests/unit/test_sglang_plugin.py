"""The plugin's hooks around stand-ins of SGLang's objects: which number lands where, in which order of events."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace
from typing import Any

import pytest

from r3.errors import ConfigError
from r3.rollout.provenance import KEY, Weights
from r3.rollout.sglang_plugin import client, hooks, plugin
from r3.rollout.sglang_plugin.ledger import LAST
from r3.rollout.sglang_plugin.plugin import Point
from tests.stand_in_scheduler import Scheduler, answer, stamps


@pytest.fixture(autouse=True)
def every_capturer_is_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_captures_routing", lambda capturer: True)


@pytest.mark.parametrize("overlap", [False, True])
def test_rows_and_tokens_carry_the_number_of_their_pass(overlap: bool) -> None:
    engine, one = Scheduler(overlap), answer(3, 5, 6, 7, 8, 9)
    for slots in ((5, 6, 7), (8,)):
        engine.process(engine.launch(*slots), one)
    engine.process(engine.launch(9), one, finish=one)

    assert stamps(one) == ([1, 1, 1, 2, 3], [1, 2, 3], (Weights(1, "4", 0),))


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


def test_numbers_that_run_out_stop_the_stamps_instead_of_the_engine() -> None:
    engine, one = Scheduler(False), answer(2, 5, 6, 7)
    engine.ledger.forward = LAST - 1
    engine.process(engine.launch(5, 6), one)
    engine.process(engine.launch(7), one, finish=one)
    assert one.customized_info is None
    with pytest.raises(RuntimeError, match="restart the engine"):
        engine.hooks.switch(engine, True)


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


def test_how_ids_are_copied_is_said_once_a_pass_has_shown_it(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, cautious, fresh = Engine(), Engine("layers share the memory of their ids"), Engine(client.NOT_COMPARED)
    assert client.copies(engine) == "ids of all layers are copied at once"
    assert engine.calls == [("r3_one_copy", {})]
    assert client.copies(cautious) == (
        "ids of every layer are copied on their own (layers share the memory of their ids)"
    )
    assert client.copies(fresh) == ""
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    assert client.copies(engine) == ""
    assert len(engine.calls) == 1, "an engine without the plugin is not asked"


def test_returns_are_opened_refused_or_left_off(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, refusing = Engine(), Engine("pp_size=2: rows of a KV slot ...")
    owner, reason = client.open_returns(engine, "auto", 1 << 16, prefault=True)
    assert owner is not None
    assert (owner.size, reason) == (1 << 16, "")
    assert engine.calls == [("r3_returns", {"path": owner.path})]
    assert client.open_returns(engine, "off", 1 << 16, prefault=False) == (None, "routing.shared_memory is off")
    assert client.open_returns(refusing, "auto", 1 << 16, prefault=False) == (
        None, "the plugin r3_provenance does not return rows through shared memory: pp_size=2: rows of a KV slot ...",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"routing.shared_memory is require, but .*pp_size=2"):
        client.open_returns(refusing, "require", 1 << 16, prefault=False)

    def full(*arguments: Any) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"no shared memory of 2 MiB \(routing.shared_mib\): no memory"):
        client.open_returns(engine, "require", 2 << 20, prefault=True)
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    assert "leaves the plugin r3_provenance out" in client.open_returns(engine, "auto", 64, prefault=False)[1]
