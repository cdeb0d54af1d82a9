"""The built-in model: built once, found again, safe under two builders, and a Hugging Face directory like any other."""

from __future__ import annotations

import fcntl
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import r3.builtin
from r3.builtin import MODEL_FILES, RECIPES, Recipe, resolve_model
from r3.config import TaskConfig
from r3.errors import ConfigError
from r3.tasks import encode, open_task

NAME = "builtin:tiny-qwen3moe"


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real recipe with random weights, built by the real subprocess."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("R3_CACHE", str(tmp_path_factory.mktemp("cache")))
        return resolve_model(NAME, target_reward=0, seed=3)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("R3_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pretend_build(monkeypatch: pytest.MonkeyPatch, stdout: str = "", code: int = 0) -> list[Path]:
    """Replaces the subprocess by one that writes empty files at once; returns the list of its output folders."""
    built: list[Path] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        out = Path(command[command.index("--out") + 1])
        assert not out.exists(), "the builder must start from nothing"
        out.mkdir()
        for name in MODEL_FILES if code == 0 else MODEL_FILES[:2]:
            (out / name).write_text("{}")
        built.append(out)
        return subprocess.CompletedProcess(command, code, stdout)

    monkeypatch.setattr(r3.builtin.subprocess, "run", run)
    return built


def test_model_is_what_the_recipe_says(random_model: Path) -> None:
    config = json.loads((random_model / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    expected = {
        "num_hidden_layers": 4,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "hidden_size": 128,
        "head_dim": 64,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "dtype": "float32",
    }
    assert {key: config[key] for key in expected} == expected
    assert config["vocab_size"] % 16 == 0
    record = json.loads((random_model / "warmstart.json").read_text())
    assert 1.5e6 < record["parameters"] < 2.5e6
    assert (record["steps"], record["reward"]) == (0, None)
    assert Recipe(**record["recipe"]) == replace(RECIPES["tiny-qwen3moe"], target_reward=0.0, seed=3)


def test_every_tensor_is_in_the_file_and_loads_without_complaint(random_model: Path) -> None:
    from safetensors.numpy import load_file
    from transformers import Qwen3MoeForCausalLM

    tensors = load_file(random_model / "model.safetensors")
    experts = [name for name in tensors if name.endswith("experts.15.down_proj.weight")]
    assert len(experts) == 4, "one tensor per expert and layer, as in published checkpoints"
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    model, report = Qwen3MoeForCausalLM.from_pretrained(random_model, output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.num_experts == 16
    stop = json.loads((random_model / "generation_config.json").read_text())["eos_token_id"]
    assert stop == model.config.eos_token_id


def test_no_token_has_an_empty_embedding(random_model: Path) -> None:
    from safetensors.torch import load_file

    norms = load_file(random_model / "model.safetensors")["model.embed_tokens.weight"].norm(dim=1)

    assert norms.min() > 0.3 * norms.mean(), f"token {int(norms.argmin())}: the norm behind it blows up its gradient"


def test_tokenizer_keeps_letters_apart_and_merges_the_template(random_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(random_model)
    assert tokenizer.tokenize("queenthing") == list("queenthing")
    assert tokenizer.tokenize("2048") == list("2048")
    task = open_task(TaskConfig(args={"min_word_len": 3, "max_word_len": 6}))
    prompt = task.train_prompt(0)
    ids = encode(tokenizer, prompt)
    text = tokenizer.decode(ids)
    assert text.endswith(f"{prompt.text}<|im_end|>\n<|im_start|>assistant\n")
    assert len(ids) < len(text) / 3, "template words must be single tokens"
    assert tokenizer.decode(tokenizer.encode("naïve 漢字 ok")) == "naïve 漢字 ok", "bytes cover every text"
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.fixture
def restored_torch() -> Iterator[None]:
    """A build owns its process; here it shares one, so its settings are put back."""
    import torch

    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.usefixtures("restored_torch")
def test_warm_start_learns_stops_at_the_target_and_repeats_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from r3 import warmstart

    recipe = replace(Recipe(), batch_size=16, measure_every=10, threads=1, target_reward=0.3)
    digests = []
    for name in ("first", "second"):
        rewards = iter([0.0, 0.29, 0.31, 0.9])
        monkeypatch.setattr(warmstart, "sampled_reward", lambda *_, rewards=rewards, **__: next(rewards))
        warmstart.build(recipe, tmp_path / name)
        digests.append(hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[1]
    record = json.loads((tmp_path / "first" / "warmstart.json").read_text())
    assert (record["steps"], record["reward"]) == (30, 0.31)
    assert [measured["reward"] for measured in record["measured"]] == [0.0, 0.29, 0.31]
    losses = [measured["loss"] for measured in record["measured"]]
    assert losses[2] < losses[1] < losses[0]


def test_measured_reward_is_the_share_of_right_answers_to_held_out_prompts(random_model: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    from r3 import warmstart

    tokenizer = AutoTokenizer.from_pretrained(random_model)
    task = open_task(TaskConfig(args={"min_word_len": 3, "max_word_len": 6}))

    class Answers(torch.nn.Module):
        """Answers every fourth prompt correctly, the way that `generate` returns text."""

        def generate(self, input_ids: torch.Tensor, **settings: object) -> torch.Tensor:
            assert (settings["temperature"], settings["top_k"], settings["top_p"]) == (1.0, 0, 1.0)
            questions = tokenizer.batch_decode(input_ids, skip_special_tokens=True)
            words = [question.removesuffix("\nassistant\n").split()[-1] for question in questions]
            texts = [word[::-1] if row % 4 == 0 else word + "?" for row, word in enumerate(words)]
            answers = tokenizer([text + "<|im_end|>" for text in texts], padding=True, padding_side="right")
            return torch.cat([input_ids, torch.tensor(answers["input_ids"])], 1)

    asked: list[int] = []
    real = task.source.heldout_prompt
    spied = replace(task, source=SimpleNamespace(heldout_prompt=lambda index: asked.append(index) or real(index)))
    recipe = replace(Recipe(), measure_prompts=8)
    assert warmstart.sampled_reward(Answers(), tokenizer, spied, recipe, seed=0) == 0.25
    assert min(asked) >= 1_000_000, "far from the prompts that a run is evaluated on"


@pytest.mark.usefixtures("restored_torch")
def test_a_target_that_is_never_reached_exits_2_with_the_best_reward(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from r3.warmstart import main

    recipe = replace(Recipe(), max_steps=2, measure_every=1, measure_prompts=4, batch_size=4, target_reward=0.9)
    assert main(["--recipe", json.dumps(asdict(recipe)), "--out", str(tmp_path / "never")]) == 2
    said = capsys.readouterr()
    assert "a sampled reward of 0.00 in 2 steps, below target_reward=0.9; lower the target" in said.out
    assert "step 2/2" in said.err
    assert not (tmp_path / "never").exists()


@pytest.mark.slow
def test_default_recipe_reaches_its_target(cache: Path) -> None:
    record = json.loads((resolve_model(NAME, target_reward=0.35, seed=0) / "warmstart.json").read_text())
    assert 0.35 <= record["reward"] <= 0.5


def test_second_call_finds_the_first_and_other_arguments_build_another(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = pretend_build(monkeypatch)
    first = resolve_model(NAME, target_reward=0.3, seed=0)
    assert first.parent == cache
    assert resolve_model(NAME, target_reward=0.3, seed=0) == first
    assert len(built) == 1
    others = {resolve_model(NAME, target_reward=0.4, seed=0), resolve_model(NAME, target_reward=0.3, seed=1)}
    assert len(others | {first}) == 3


def test_every_field_of_the_recipe_changes_the_folder() -> None:
    recipe = Recipe()
    for field in recipe.__slots__:
        value = getattr(recipe, field)
        changed = replace(recipe, **{field: value + "x" if isinstance(value, str) else value + 1})
        assert changed.digest() != recipe.digest(), field


def test_models_that_are_cached_already_are_found() -> None:
    assert RECIPES["tiny-qwen3moe"].digest() == "6365ee2e658c"
    assert RECIPES["tiny-qwen3"].digest() == "6e17eb71f32a"


def test_a_model_for_a_gpu_is_not_trained_on_a_cpu(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"needs a GPU .* R3_CACHE .* model\.warm_start_reward: 0"):
        resolve_model("builtin:qwen3moe-1b", target_reward=0.35, seed=0)


def test_half_precision_weights_follow_adamw_on_fp32_ones() -> None:
    import torch

    from r3.warmstart import MainWeights

    torch.manual_seed(0)
    model, twin = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    twin.load_state_dict(model.state_dict())
    main = MainWeights(model)  # type: ignore[arg-type]
    optimizers = [torch.optim.AdamW(weights, lr=1e-4) for weights in (main.weights, twin.parameters())]
    for _ in range(50):
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            gradient = torch.randn_like(other).bfloat16()
            parameter.grad, other.grad = gradient.clone(), gradient.float()
        main.take_gradients()
        for optimizer in optimizers:
            optimizer.step()
        main.give_weights()
    for weight, parameter, expected in zip(main.weights, model.parameters(), twin.parameters(), strict=True):
        # Steps of 1e-4 vanish in bfloat16 and add up in fp32.
        assert torch.equal(weight, expected)
        assert torch.equal(parameter, expected.bfloat16())
        assert parameter.grad is None


def test_damaged_or_half_built_folders_are_built_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = pretend_build(monkeypatch)
    folder = resolve_model(NAME, target_reward=0.3, seed=0)
    (folder / "model.safetensors").unlink()
    (folder.with_name(folder.name + ".partial")).mkdir()
    assert resolve_model(NAME, target_reward=0.3, seed=0) == folder
    assert len(built) == 2
    assert (folder / "model.safetensors").is_file()


def test_failed_build_leaves_nothing_and_says_why(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_build(monkeypatch, stdout="the reward stayed at 0.1\n", code=2)
    with pytest.raises(ConfigError, match=r"building builtin:tiny-qwen3moe failed: the reward stayed at 0\.1"):
        resolve_model(NAME, target_reward=0.3, seed=0)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_second_builder_waits_and_uses_what_the_first_built(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_build(monkeypatch)
    folder = resolve_model(NAME, target_reward=0.3, seed=0)
    built = pretend_build(monkeypatch)
    moved = folder.rename(folder.with_name("aside"))
    asked = threading.Event()
    real = fcntl.flock

    def flock(file: object, flags: int) -> None:
        if not flags & fcntl.LOCK_NB:
            asked.set()
        real(file, flags)  # type: ignore[arg-type]

    monkeypatch.setattr(r3.builtin.fcntl, "flock", flock)
    found: list[Path] = []
    with folder.with_name(folder.name + ".lock").open("w") as held:
        real(held, fcntl.LOCK_EX)
        waiter = threading.Thread(target=lambda: found.append(resolve_model(NAME, target_reward=0.3, seed=0)))
        waiter.start()
        assert asked.wait(timeout=30)
        assert not found
        moved.rename(folder)  # the first builder finishes
    waiter.join(timeout=30)
    assert found == [folder]
    assert not built
    assert "another process is building" in capsys.readouterr().err


def test_a_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("mine", target_reward=0.3, seed=0) == tmp_path / "mine"


@pytest.mark.parametrize(
    ("name", "target", "said"),
    [
        ("Qwen/Qwen3-30B-A3B", 0.3, r"'Qwen/Qwen3-30B-A3B': .*config\.json does not exist.*hf download"),
        ("builtin:tiny", 0.3, r"'builtin:tiny' is no built-in model; there is: builtin:tiny-qwen3moe"),
        (NAME, 1.0, r"target_reward of builtin:tiny-qwen3moe is 1\.0; it must be at least 0 and below 1"),
    ],
)
def test_wrong_names_and_targets_are_explained(name: str, target: float, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve_model(name, target_reward=target, seed=0)


def test_unwritable_cache_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("R3_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(ConfigError, match="set R3_CACHE to a writable folder"):
        resolve_model(NAME, target_reward=0.3, seed=0)


def test_resolving_imports_nothing_heavy() -> None:
    check = (
        "import sys, r3.builtin; heavy = {'torch', 'transformers', 'ray'} & set(sys.modules); assert not heavy, heavy"
    )
    repository = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", check], cwd=repository, check=True)
