"""`python -m r3.mismatch` before anything starts: help, mistakes, and what it makes of measurements."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from r3 import mismatch
from r3.config import Config
from r3.errors import ConfigError
from r3.study import Collected, Study, Variant, control_variants, replay_variants
from r3.trainer.use import RoutingUse
from r3.types import ModelSpec
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
        size = np.full(100, 4, np.int64)
        found[variant.key] = Collected([d], [size], [np.arange(100) // 2], [np.array([10.0, 40, 4, 2])])
    return Study(variants, found, compared, {"rounds": 1})


def test_the_report_has_every_row_and_factor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moe = study(0.2, True, (*replay_variants(SPEC), *control_variants([], records=True)))
    moe.found["control_shift"].alarms.update({"lag", "k3"})
    plain = study(0.1, False, (Variant("native", "native", RoutingUse(False)),))
    monkeypatch.setattr(mismatch, "_study", lambda config, *_: plain if config.model.path == "twin" else moe)
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


def test_out_is_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(mismatch, "_check", lambda config: None)
    monkeypatch.setattr(mismatch, "_report", lambda *_: {"rows": []})
    out = tmp_path / "t.json"
    assert mismatch.main(["--config", "grpo_qwen3moe", "--out", str(out), "--json"]) == 0
    assert json.loads(out.read_text()) == json.loads(capsys.readouterr().out) == {"rows": []}
