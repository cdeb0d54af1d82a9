"""`python -m r3.mismatch` before anything starts: help, mistakes, and what it makes of measurements."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from r3 import mismatch
from r3.config import Config
from r3.consistency import cluster_sums
from r3.errors import ConfigError, DivergenceError
from r3.metrics import RouterCounts
from r3.study import (
    NOTHING,
    Collected,
    Earlier,
    Keep,
    Study,
    Variant,
    control_variants,
    measure,
    replay_variants,
    variants_of,
)
from r3.tasks import Task
from r3.trainer.outcome import Recomputation, Recomputed
from r3.trainer.use import RoutingUse
from r3.types import ModelSpec, Prompt
from tests.command import ROOT, refused, run_module
from tests.tiny_model import CONFIG, write_files
from tests.tiny_weights import write_weights

COMMAND = ("r3.mismatch", "--config", "grpo_qwen3moe")
HEAVY = ("torch", "ray", "sglang", "megatron", "wandb", "transformers")
SPEC = ModelSpec.from_hf_config(CONFIG)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(write_files(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_files(tmp_path_factory.mktemp("dense"), model_type="qwen3", num_experts=None)
    return write_weights(folder)


def test_help_is_complete_and_light(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\n"
        f"atexit.register(lambda: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr))\n"
    )
    result = run_module("r3.mismatch", "--help", path=(ROOT, tmp_path))
    assert result.returncode == 0
    assert result.stderr.splitlines()[-1] == "[]"
    for option in ("--engine-dtype", "--trainer-dtype", "--tokens", "--dense", "--controls", "--noise", "--out"):
        assert option in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rollout.dtyp=float32"], "rollout.dtype"),
        (["routing.capture=false", "replay.mode=none", "--controls"], "the table has one row"),
        (["--tokens", "0"], "must be positive"),
        (["--rows", "native,r4"], "--rows r4: there are native, r3"),
        (["--out", "no/such/folder/t.json"], "is no directory"),
        (["model=/no/such/model"], "config.json does not exist"),
        (["--dense", "/no/such/model"], "config.json does not exist"),
    ],
)
def test_mistakes_are_one_message(tmp_path: Path, model: Path, arguments: list[str], message: str) -> None:
    given = arguments if any("model=" in a for a in arguments) else [f"model={model}", *arguments]
    refused(run_module(*COMMAND, *given, cwd=tmp_path), 2, message)


def test_a_dense_model_has_nothing_to_replay(tmp_path: Path, dense: Path) -> None:
    refused(run_module(*COMMAND, f"model={dense}", cwd=tmp_path), 2, "is dense: there is no routing to capture")


def options(**changes: Any) -> argparse.Namespace:
    given = mismatch._parser().parse_args(["--config", "grpo_qwen3moe"])
    return argparse.Namespace(**(vars(given) | changes))


def test_the_dtypes_are_those_of_engine_and_trainer() -> None:
    config = mismatch.study_config(options(engine_dtype="float32", trainer_dtype="bfloat16"))
    assert (config.rollout.dtype, config.trainer.dtype) == ("float32", "bfloat16")
    twin = mismatch.dense_config(config, "there")
    assert (twin.model.path, twin.routing.capture, twin.replay.mode) == ("there", False, "none")
    assert (twin.rollout.dtype, twin.trainer.dtype) == ("float32", "bfloat16")
    Config.model_validate(twin.model_dump())
    with pytest.raises(ConfigError, match="must be positive"):
        mismatch.study_config(options(control_tokens=0))


def test_the_variants_are_what_their_names_say() -> None:
    by_key = {variant.key: variant for variant in replay_variants(SPEC)}
    assert by_key["r3_last_half"].use.layers == (2, 3)
    assert by_key["r3_response"].use.sampled_rows
    assert not by_key["native"].use.force
    controls = control_variants([0.5], records=True)
    assert len({variant.key for variant in controls}) == len(controls) == 6
    assert all(variant.control for variant in controls)
    assert [v.name for v in control_variants([0.5], records=False)] == [
        "injected router noise 0.5, native",
        "injected router noise 0.5, R3",
    ]


def study(scale: float, compared: bool, variants: tuple[Variant, ...], seed: int = 0) -> Study:
    """A study whose d is normal, `scale` natively and half of it under replay."""
    generator, found = np.random.default_rng(seed), {}
    for variant in variants:
        d = generator.normal(0, scale * (0.5 if variant.use.force else 1), 400)
        sums = cluster_sums(d, np.full(100, 4, np.int64), np.arange(100) // 2)
        found[variant.key] = Collected([sums], [np.array([10.0, 40, 4, 2])])
    return Study(variants, found, 1, compared, 0.1, {})


def test_the_report_has_every_row_and_factor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moe = study(0.2, True, (*replay_variants(SPEC), *control_variants([], records=True)))
    moe.found["control_shift"].alarms.update({"lag", "k3"})
    plain = study(0.1, False, (Variant("native", "native", RoutingUse(False)),))

    def made_up(config: Config, _: object, __: object, keep: Keep, **___: object) -> None:
        keep(plain if config.model.path == "twin" else moe)

    monkeypatch.setattr(mismatch, "_study", made_up)
    config = mismatch.study_config(options())
    report = mismatch._report(options(dense="twin"), config, mismatch.dense_config(config, "twin"))
    assert [row["key"] for row in report["rows"]] == [
        "native", "r3", "r3_response", "r3_last_half", "dense",
        "control_shift", "control_neighbour", "control_reverse", "control_gates",
    ]  # fmt: skip
    assert json.loads(json.dumps(report)) is not None
    ratio = report["factors"]["native k3 / R3 k3"]
    assert ratio["low"] < 4 < ratio["high"], "k3 is about the square of d"
    assert report["factors"]["native k3 / dense k3"]["value"] == pytest.approx(4, rel=0.3)
    assert "disagree_token" not in report["rows"][4]["values"], "a dense model has no routers"
    text = capsys.readouterr().out
    assert "| control: shifted by one token |" in text
    assert "k3, lag |" in text
    assert "400 response tokens of 100 answers" in text
    assert "native k3 / R3 k3: " in text


class Pool:
    """Stands where the engine does: every round samples the same number of answers."""

    def generate(self, prompts: list[Prompt], step: int) -> Any:
        return SimpleNamespace(batches=(step, [prompt.index for prompt in prompts]), seconds=1.0)

    def spec(self) -> Any:
        return SimpleNamespace(engine="made up")


class Trainers:
    """Stands where the trainer does; its numbers are a function of the round and the use."""

    def spec(self) -> ModelSpec:
        return SPEC

    def versions(self) -> dict[str, str]:
        return {}

    def measure(self, uses: tuple[RoutingUse, ...], batches: tuple[int, list[int]]) -> Recomputed:
        step, prompts = batches
        generator = np.random.default_rng(step)
        rollout, passes = -generator.random(12 * len(prompts)), []
        for use in uses:
            train = rollout + generator.normal(0, 0.1 if use.force else 0.2, len(rollout))
            counts = replace(RouterCounts.zero(4, 8), compared=10, disagree_any=step)
            passes.append(Recomputation(train, counts, {}, 0.5))
        return Recomputed(rollout, np.full(3 * len(prompts), 4), np.arange(3 * len(prompts)) // 3, tuple(passes))


def measured(tokens: int, earlier: Earlier, seconds: float = math.inf, keep: Keep = lambda _: None) -> Study:
    """Return the last of what `keep` was given too."""
    config = mismatch.study_config(options(overrides=["rollout.prompts_per_step=4"]))
    task = Task(SimpleNamespace(train_prompt=lambda i: Prompt(i, f"{i}", "")), lambda *_: 0.0)  # type: ignore[arg-type]
    kept: list[Study] = []

    def both(found: Study) -> None:
        kept.append(found)
        keep(found)

    measure(
        config, task, Pool(), Trainers(), variants_of(config, SPEC, (), ("native", "r3")),  # type: ignore[arg-type]
        tokens=tokens, control_tokens=1, seconds=seconds, earlier=earlier, keep=both, say=lambda text: None,
    )  # fmt: skip
    return kept[-1]


def test_a_study_in_pieces_is_the_study_in_one_go() -> None:
    whole, first = measured(190, NOTHING), measured(60, NOTHING)
    assert (whole.rounds, first.rounds) == (4, 2), "48 tokens a round, whole rounds"
    second = measured(190, mismatch.earlier_of(json.loads(json.dumps(mismatch._kept(first)))))
    assert second.rounds == 4
    assert list(second.rows()) == list(whole.rows())
    assert [row.tokens for row in whole.rows()] == [192, 192]
    assert whole.found["native"].k3() > 2 * whole.found["r3"].k3()
    third = measured(190, mismatch.earlier_of(mismatch._kept(second)))
    assert third.rounds == 4, "there are tokens enough"


def test_time_ends_a_study_behind_a_round() -> None:
    assert measured(10_000, NOTHING, seconds=0.0).rounds == 1


def test_a_difference_that_is_not_finite_is_an_error() -> None:
    found = Trainers().measure((RoutingUse(force=False),), (1, [1, 2]))
    found.passes[0].logprobs[3] = np.nan
    with pytest.raises(DivergenceError, match="not finite"):
        Collected().add(found, found.passes[0], 4)


def test_only_a_report_of_the_same_setting_is_added_to(tmp_path: Path) -> None:
    config, file = mismatch.study_config(options()), tmp_path / "a.json"
    kept = {"model": "m", **mismatch._kept(measured(60, NOTHING))}
    file.write_text(json.dumps({"setting": mismatch._setting(config), "studies": {"moe": kept}}))
    assert mismatch.read_earlier(file, config).keys() == {"m"}
    other = mismatch.study_config(options(engine_dtype="float32"))
    with pytest.raises(ConfigError, match="engine_dtype is 'bfloat16', now 'float32'"):
        mismatch.read_earlier(file, other)
    for text in ("no json", "[]", "{}"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="is not what --out of this command writes"):
            mismatch.read_earlier(file, config)


def test_interrupts_and_errors_are_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> SimpleNamespace:
        raise KeyboardInterrupt

    monkeypatch.setattr(mismatch, "_check", lambda config: None)
    monkeypatch.setattr(mismatch, "_report", interrupted)
    assert mismatch.main(["--config", "grpo_qwen3moe"]) == 130
    assert mismatch.main(["--config", "there_is_none"]) == 2
    assert "error: no config" in capsys.readouterr().err


def test_json_takes_the_place_of_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(mismatch, "_check", lambda config: None)
    monkeypatch.setattr(mismatch, "_report", lambda *_: {"rows": []})
    assert mismatch.main(["--config", "grpo_qwen3moe", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"rows": []}


def test_a_killed_command_leaves_the_rounds_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is whole behind every round; a command that goes on from it ends where one in one go does."""
    out, given = tmp_path / "t.json", ["rollout.prompts_per_step=4", "metrics.alarm_k3=0.001"]

    def study(stop: int, tokens: int) -> Any:
        def run(config: Config, options: Any, earlier: Any, keep: Keep, **_: object) -> None:
            before = earlier.get(config.model.path)

            def kept(found: Study) -> None:
                keep(found)
                if found.rounds == stop:
                    raise KeyboardInterrupt

            measured(tokens, NOTHING if before is None else mismatch.earlier_of(before), keep=kept)

        return run

    def report(name: str, *more: str) -> Any:
        assert mismatch.main(["--config", "grpo_qwen3moe", "--json", "--out", str(tmp_path / name), *more, *given]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert json.loads((tmp_path / name).read_text()) == printed
        return printed

    monkeypatch.setattr(mismatch, "_check", lambda config: None)
    monkeypatch.setattr(mismatch, "_study", study(stop=2, tokens=190))
    assert mismatch.main(["--config", "grpo_qwen3moe", "--out", str(out), *given]) == 130
    assert [row["tokens"] for row in json.loads(out.read_text())["rows"]] == [96, 96]
    monkeypatch.setattr(mismatch, "_study", study(stop=0, tokens=190))
    assert report("t.json", "--add", str(out))["rows"] == report("whole.json")["rows"]


def test_a_twin_that_was_not_reached_keeps_what_it_had() -> None:
    config = mismatch.study_config(options())
    twin = mismatch.dense_config(config, "twin")
    moe, before = study(0.2, True, replay_variants(SPEC)), {"twin": {"model": "twin", "rounds": 3}}
    assert mismatch._contents(config, twin, {"moe": moe}, before, [], {})["studies"]["dense"] == before["twin"]


def test_controls_beyond_the_limit_of_k3_raise_an_alarm() -> None:
    variants = control_variants([], records=True)
    for limit, alarms in ((0.2, ()), (0.001, ("k3",))):
        found = replace(study(0.2, True, variants), alarm_k3=limit)
        assert {row.alarms for row in found.rows()} == {alarms}
