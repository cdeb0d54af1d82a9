"""The rollout worker, in this process, over an engine without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3.config import Config
from r3.errors import ConfigError, EngineError, MissingRoutingError, RoutingError
from r3.rollout.engine import check_generation, open_engine, stop_token_ids
from r3.rollout.worker import RolloutWorker
from r3.types import Prompt
from r3.weights import WeightBuckets
from tests.fake_engine import FakeEngine
from tests.tiny_model import EOS, write_files

MakeConfig = Callable[..., Config]
PROMPTS = tuple(Prompt(i, f"prompt number {i}", str(i)) for i in range(8))


def worker(config: Config, model_dir: Path) -> RolloutWorker:
    return RolloutWorker(config, str(model_dir), 0)


def test_samples_come_group_by_group_with_their_own_reward_and_routing(
    make_config: MakeConfig, model_dir: Path
) -> None:
    report, batch = worker(make_config(), model_dir).generate(PROMPTS, 5, 3)

    trajectories = batch.trajectories()
    assert [(t.group, t.member) for t in trajectories] == [(5 + i, m) for i in range(8) for m in range(3)]
    assert batch.facts() == report.facts
    for i, trajectory in enumerate(trajectories):
        assert trajectory.reward == PROMPTS[i // 3].index * 1000 + trajectory.response_len
        assert trajectory.prompt_len == len(PROMPTS[i // 3].text)
        assert trajectory.routing is not None
        assert trajectory.routing.rows == len(trajectory.tokens) - 1
        trajectory.routing.verify(trajectory.tokens)
    assert report.response_tokens == sum(t.response_len for t in trajectories)
    assert report.routing_bytes == sum(piece.nbytes for block in batch.blocks for piece in block.stored)
    assert report.routing_rows == len(batch.tokens) - len(batch)


def test_a_bad_record_stops_the_run_and_names_the_sample(make_config: MakeConfig, model_dir: Path) -> None:
    with pytest.raises(RoutingError, match=r"prompt 0, group 0, member 0: .*made-up defect.*drop_sample"):
        worker(make_config({"bad_every": 5}), model_dir).generate(PROMPTS, 0, 3)


@pytest.mark.parametrize(("fault", "reason"), [("bad_every", "made-up defect"), ("abort_every", "aborted")])
def test_unusable_samples_are_dropped_and_counted(
    make_config: MakeConfig, model_dir: Path, fault: str, reason: str
) -> None:
    report, batch = worker(make_config({fault: 5}, on_error="drop_sample"), model_dir).generate(PROMPTS, 0, 3)

    gone = [(number // 3, number % 3) for number in range(0, 24, 5)]
    assert [(d.group, d.member) for d in report.dropped] == gone
    assert all(reason in d.reason for d in report.dropped)
    assert [(f.group, f.member) for f in report.facts] == [
        (g, m) for g in range(8) for m in range(3) if (g, m) not in gone
    ]
    assert len(batch) == 24 - len(gone)


@pytest.mark.parametrize(
    ("fault", "policy", "reason"),
    [("bad_every", "on_error", "made-up defect"), ("missing_every", "on_missing", "no routing came back")],
)
def test_samples_without_a_usable_record_are_trained_natively_and_counted(
    make_config: MakeConfig, model_dir: Path, fault: str, policy: str, reason: str
) -> None:
    report, batch = worker(make_config({fault: 5}, **{policy: "native_sample"}), model_dir).generate(PROMPTS, 0, 3)

    native = [(number // 3, number % 3) for number in range(0, 24, 5)]
    assert [(d.group, d.member) for d in report.native] == native
    assert all(reason in d.reason for d in report.native)
    assert report.dropped == ()
    for trajectory in batch.trajectories():
        assert (trajectory.routing is None) == ((trajectory.group, trajectory.member) in native)
        if trajectory.routing is not None:
            trajectory.routing.verify(trajectory.tokens)


def test_a_missing_record_stops_the_run_whatever_becomes_of_malformed_ones(
    make_config: MakeConfig, model_dir: Path
) -> None:
    config = make_config({"missing_every": 5}, on_error="drop_sample")
    with pytest.raises(MissingRoutingError, match=r"prompt 0, group 0, member 0: no routing came back.*on_missing"):
        worker(config, model_dir).generate(PROMPTS, 0, 3)


def test_answers_are_checked_as_they_come(
    make_config: MakeConfig, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    class Streaming(FakeEngine):
        def generate(self, requests: Any, sampling: Any, *, capture: bool) -> Iterator[Any]:
            for answer in super().generate(requests, sampling, capture=capture):
                order.append("made")
                yield answer

    def note(*arguments: Any, **options: Any) -> Any:
        order.append("checked")
        return check_generation(*arguments, **options)

    monkeypatch.setattr("r3.rollout.worker.check_generation", note)
    config = make_config({"bad_every": 5}, on_error="drop_sample")
    rollouts = worker(config, model_dir)
    rollouts._engine = Streaming(config, model_dir, 0)
    report, batch = rollouts.generate(PROMPTS, 0, 3)

    assert order == ["made", "checked"] * 24
    assert (len(report.dropped), len(batch)) == (5, 19)
    assert report.check_seconds > 0


def test_a_layer_that_never_changes_is_refused_even_where_samples_are_dropped(
    make_config: MakeConfig, model_dir: Path
) -> None:
    with pytest.raises(RoutingError, match="layer 2 routes all"):
        worker(make_config({"constant_layer": 2}, on_error="drop_sample"), model_dir).generate(PROMPTS, 0, 3)


def test_evaluation_scores_greedy_answers_in_order(make_config: MakeConfig, model_dir: Path) -> None:
    report = worker(make_config(), model_dir).evaluate(PROMPTS)

    assert report.rewards == tuple(prompt.index * 1000 + 2 for prompt in PROMPTS)


def test_new_weights_stamp_what_follows(make_config: MakeConfig, model_dir: Path) -> None:
    rollouts = worker(make_config(), model_dir)
    assert rollouts.load_weights(WeightBuckets(version=7, buckets=())) >= 0

    report, batch = rollouts.generate(PROMPTS, 0, 1)
    assert report.weight_version == 7
    assert set(batch.weight_versions.tolist()) == {7}
    assert {span.weight_version for spans in batch.spans for span in spans} == {7}


def test_canary_returns_a_batch_of_sampled_answers(make_config: MakeConfig, model_dir: Path) -> None:
    report, batch = worker(make_config(), model_dir).canary(PROMPTS)

    assert (report.equal_tokens, report.equal_rows) == (1.0, 1.0)
    assert report.cached_tokens == sum(len(prompt.text) - 1 for prompt in PROMPTS)
    assert batch.groups.tolist() == list(range(8))


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"stale_mix": True}, r"only 0\.0% of the prompt's routing rows"),
        ({"missing_every": 3}, "no routing came back"),
        ({"bad_every": 3}, "made-up defect"),
        ({"abort_every": 3}, "aborted by the engine"),
    ],
)
def test_the_canary_is_strict_whatever_the_policies(
    make_config: MakeConfig, model_dir: Path, faults: dict[str, Any], message: str
) -> None:
    config = make_config(faults, on_error="native_sample", on_missing="drop_sample")
    with pytest.raises(RoutingError, match=f"start-up canary: .*{message}"):
        worker(config, model_dir).canary(PROMPTS)


def test_canary_refuses_rows_that_change_with_the_cache(make_config: MakeConfig, model_dir: Path) -> None:
    with pytest.raises(RoutingError, match=r"start-up canary: only 0\.0% of the prompt's routing rows"):
        worker(make_config({"stale_cache": True}), model_dir).canary(PROMPTS)


def test_a_run_without_capture_has_no_routing(make_config: MakeConfig, model_dir: Path) -> None:
    config = Config.model_validate(
        make_config().model_dump() | {"routing": {"capture": False}, "replay": {"mode": "none"}}
    )
    report, batch = worker(config, model_dir).generate(PROMPTS, 0, 2)

    assert batch.blocks == ()
    assert report.routing_bytes == report.routing_rows == 0
    assert len(report.facts) == 16


def test_unknown_engines_are_named(make_config: MakeConfig, model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="'tgi' is unknown"):
        open_engine(make_config(engine="tgi"), model_dir, 0)
    with pytest.raises(ConfigError, match="Missing"):
        open_engine(make_config(engine="tests.fake_engine:Missing"), model_dir, 0)


def test_stop_tokens_are_those_of_both_configs(tmp_path: Path) -> None:
    assert stop_token_ids(write_files(tmp_path / "one")) == (EOS,)
    assert stop_token_ids(write_files(tmp_path / "two", eos_token_id=[9, EOS])) == (EOS, 9)
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="names no eos_token_id"):
        stop_token_ids(tmp_path / "none")


def test_a_prompt_without_tokens_is_refused(make_config: MakeConfig, model_dir: Path) -> None:
    with pytest.raises(EngineError, match="prompt 3 has no tokens"):
        worker(make_config(), model_dir).evaluate((Prompt(3, "", ""),))


def test_record_arrays_are_narrow_and_contiguous(make_config: MakeConfig, model_dir: Path) -> None:
    _, batch = worker(make_config(), model_dir).generate(PROMPTS, 0, 3)

    (block,) = batch.blocks
    assert {piece.dtype for piece in block.stored} == {np.dtype(np.uint8)}
    assert all(piece.flags.c_contiguous for piece in block.stored)
