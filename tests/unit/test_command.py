"""Every mistake that can be known before anything starts: the real command, its exit code and its one message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from r3.config import Config
from tests.command import ROOT, refused, run_module
from tests.tiny_model import write_files
from tests.tiny_weights import write_weights

TRAIN = ("r3.train", "--config", "grpo_qwen3moe")
HEAVY = ("torch", "ray", "sglang", "megatron", "wandb", "transformers")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory that passes every check and is never run."""
    return write_weights(write_files(tmp_path_factory.mktemp("model")))


def without(folder: Path, *packages: str) -> Path:
    """Make `folder` a place that hides packages from any Python that has it on its path."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({packages!r}))\n")
    return folder


@pytest.mark.parametrize("arguments", [("--help",), (*TRAIN[1:], "--dry-run")], ids=["help", "dry-run"])
def test_help_and_dry_run_import_nothing_heavy(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\n"
        f"atexit.register(lambda: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr))\n"
    )
    result = run_module("r3.train", *arguments, path=(ROOT, tmp_path))
    assert result.returncode == 0
    assert result.stderr.splitlines()[-1] == "[]"


def test_help_shows_every_key_with_its_default() -> None:
    text = run_module("r3.train", "--help").stdout
    for section, outer in Config.model_fields.items():
        for name, field in outer.annotation.model_fields.items():  # type: ignore[union-attr]
            assert f"{section}.{name} (default {field.default})" in text


def test_a_dry_run_prints_a_config_that_loads_and_a_plan(tmp_path: Path, model: Path) -> None:
    result = run_module(*TRAIN, "--dry-run", f"model={model}", "trainer.lr=1e-6", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    loaded = Config.model_validate(yaml.safe_load(result.stdout))
    assert (loaded.model.path, loaded.trainer.lr) == (str(model), 1e-6)
    plan = [line for line in result.stdout.splitlines() if line.startswith("#")]
    for part in ("81,920 parameters", "optimizer 640.0 KiB", "routing: 16 B per token", "object store", "KV 32.0 MiB"):
        assert any(part in line for line in plan), part
    assert not list(tmp_path.iterdir()), "a dry run leaves nothing behind"


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["trainer.lrr=1"], ["trainer.lrr: unknown key; did you mean trainer.lr?"]),
        (["grpo.group_size=many"], ["grpo.group_size: Input should be a valid integer", "(got 'many')"]),
        (["trainer.lr=0", "rollout.wrkers=2", "replay.mode=off", "grpo.mini_steps=5"],
         ["4 errors", "trainer.lr: Input should be greater than 0 (got 0)", "did you mean rollout.workers?",
          "replay.mode: Input should be 'none' or 'r3' (got False)", "is not divisible by grpo.mini_steps=5"]),
        (["routing.capture=false"], ["replay.mode is r3, but routing.capture is false", "set replay.mode: none"]),
        (["rollout.engine_args.enable_return_routed_experts=false"], ["capture would be off"]),
        (["rollout.engine_args={speculative_algorithm: EAGLE, pp_size: 2}"], ["speculative_algorithm", "pp_size=2"]),
        (["rollout.engine=vllm"], ["rollout.engine='vllm' is unknown", "module:Class"]),
        (["model=/no/such/model"], ["/no/such/model/config.json does not exist", "Hugging Face"]),
        (["model=builtin:huge"], ["'builtin:huge' is no built-in model; there is: builtin:tiny-qwen3moe"]),
        (["task.kind=jsonl", "task.path=/no/file"], ["task.path=/no/file is no file"]),
        (["rollout.max_new_tokens=512"], ["no room for a prompt in the model's 512 positions"]),
        (["rollout.max_total_tokens=null"], ["rollout.max_total_tokens is null"]),
        (["lr"], ["override 'lr' is not of the form key.path=value"]),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_by_run_and_dry_run(
    tmp_path: Path, overrides: list[str], messages: list[str]
) -> None:
    refused(run_module(*TRAIN, "--dry-run", *overrides, cwd=tmp_path), 2, *messages)
    refused(run_module(*TRAIN, *overrides, f"run.dir={tmp_path}/run", cwd=tmp_path), 2, *messages)


def test_a_number_that_yaml_reads_as_text_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("trainer:\n  lr: 1e-6\n")
    assert yaml.safe_load((tmp_path / "mine.yaml").read_text())["trainer"]["lr"] == "1e-6"
    result = run_module("r3.train", "--config", "mine.yaml", "--dry-run", cwd=tmp_path)
    assert yaml.safe_load(result.stdout)["trainer"]["lr"] == 1e-6


def rename_key(directory: Path, key: str) -> None:
    config = directory / "config.json"
    config.write_text(config.read_text().replace(f'"{key}"', '"other"'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "model.safetensors").write_bytes(b"x" * 99), "is not a safetensors file"),
        (lambda d: (d / "model.safetensors").open("ab").write(b"x"), "fetch it again"),
        (lambda d: (d / "tokenizer.json").unlink() or (d / "tokenizer_config.json").unlink(), "holds no tokenizer"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda d: write_files(d, tie_word_embeddings=True), "tie_word_embeddings=true"),
        (lambda d: write_files(d, hidden_act="gelu"), "hidden_act='gelu' is not supported by the trainer"),
        (lambda d: rename_key(d, "rms_norm_eps"), "has no 'rms_norm_eps', which a Qwen3-MoE model needs"),
        (lambda d: write_files(d, model_type="llama"), "model_type is 'llama'; supported: 'qwen3_moe'"),
        (
            lambda d: write_files(d, eos_token_id=None) and (d / "generation_config.json").unlink(),
            "no eos_token_id",
        ),
    ],
)
def test_a_model_directory_that_cannot_work_is_refused(tmp_path: Path, model: Path, damage, message) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    damage(broken)
    refused(run_module(*TRAIN, "--dry-run", f"model={broken}"), 2, message)


def test_a_plan_needs_no_weights_and_a_run_does(tmp_path: Path, model: Path) -> None:
    counted = run_module(*TRAIN, "--dry-run", f"model={model}").stdout
    bare = shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
    planned = run_module(*TRAIN, "--dry-run", f"model={bare}")
    assert planned.returncode == 0, planned.stderr
    assert "(no weights there; sizes follow from config.json)" in planned.stdout
    assert "follow from" not in counted
    message = "model.safetensors does not exist; is the checkpoint complete?"
    refused(run_module(*TRAIN, f"model={bare}", f"run.dir={tmp_path}/run"), 2, message)


def test_a_run_directory_that_holds_something_is_left_alone(tmp_path: Path, model: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused(run_module(*TRAIN, f"run.dir={tmp_path}", f"model={model}"), 2, f"run.dir={tmp_path} is not empty")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("package", "extra", "overrides"),
    [
        ("sglang", "sglang", []),
        ("megatron", "megatron", []),
        ("reasoning_gym", "tasks", []),
        ("math_verify", "tasks", ["task.kind=jsonl", "task.verifier=math"]),
        ("wandb", "wandb", ["tracking.wandb=online"]),
    ],
)
def test_a_missing_extra_is_named_with_its_pip_line(
    tmp_path: Path, model: Path, package: str, extra: str, overrides: list[str]
) -> None:
    (tmp_path / "lines.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    result = run_module(
        *TRAIN, f"run.dir={tmp_path}/run", f"model={model}", f"task.path={tmp_path}/lines.jsonl", *overrides,
        path=(without(tmp_path, package), ROOT), WANDB_MODE="",
    )  # fmt: skip
    refused(result, 2, f"not installed: {package}", f"pip install 'rollout-router-replay[{extra}]'")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2)


def copy_package(folder: Path) -> Path:
    """Copy the package as an installation has it: real folders, no links."""
    ignore = shutil.ignore_patterns("__pycache__")
    return shutil.copytree(ROOT / "r3", folder / "r3", ignore=ignore)


@pytest.mark.parametrize(
    ("file", "name"),
    [("__init__.py", "r3"), ("rollout/__init__.py", "r3.rollout"), ("trainer/__init__.py", "r3.trainer")],
)
def test_a_package_that_another_distribution_overwrote_is_named(tmp_path: Path, file: str, name: str) -> None:
    foreign = copy_package(tmp_path) / file
    foreign.write_text("# somebody else's package\n")
    result = run_module(*TRAIN, "--dry-run", cwd=tmp_path, path=(tmp_path,))
    refused(result, 2, f"{foreign} belongs to a foreign package of the name {name!r}", "--force-reinstall")


def test_a_checkout_that_lost_its_links_is_told_so(tmp_path: Path) -> None:
    package = copy_package(tmp_path)
    for name in ("rollout", "trainer", "configs"):
        shutil.rmtree(package / name)
        (package / name).write_text(f"../{name}")
    refused(
        run_module(*TRAIN, "--dry-run", cwd=tmp_path, path=(tmp_path,)), 2,
        f"{package / 'rollout'} is a file where a symbolic link", "core.symlinks",
    )  # fmt: skip


def test_own_modules_of_the_same_names_in_the_current_directory_do_no_harm(tmp_path: Path) -> None:
    for name in ("trainer", "rollout", "configs"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the user was imported by r3')\n")
    result = run_module(*TRAIN, "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_an_installation_that_lost_its_own_files_is_told_so(tmp_path: Path) -> None:
    """Uninstalling a distribution that had overwritten a file of ours deletes it; `r3` then is a namespace package."""
    (copy_package(tmp_path) / "__init__.py").unlink()
    result = run_module(*TRAIN, "--dry-run", cwd=tmp_path, path=(tmp_path,))
    refused(result, 2, f"r3 has no {tmp_path / 'r3' / '__init__.py'}; the installation is damaged", "--force-reinstall")
