"""Models that R3 makes itself: built once by a subprocess, cached, used like any other Hugging Face directory."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from r3.errors import ConfigError

PREFIX = "builtin:"
# What a finished directory holds; one with less was damaged from outside and is built again.
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "warmstart.json")


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the weights of a built-in model; its hash names the cache folder.

    Sizes are those of a Hugging Face `Qwen3MoeConfig`. The supervised phase runs AdamW at `learning_rate` with a cosine
    over `max_steps` and stops at the first measurement (sampled at temperature 1.0, every `measure_every` steps on
    `measure_prompts` held-out prompts) of at least `target_reward`; 0 leaves the weights random. With 0 `experts` it is
    the dense twin, a `Qwen3Config`: every token passes one MLP as wide as `top_k` experts together.
    """

    version: int = 5
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    # 64: the smallest that SGLang's fused CUDA kernels take, so that one model runs on CPU and GPU.
    head_dim: int = 64
    experts: int = 16
    top_k: int = 4
    expert_size: int = 64
    max_positions: int = 512
    # Rows of the embedding are rounded up to this, so that tensor-parallel ranks split them evenly.
    vocab_multiple: int = 16
    task: str = "spell_backward"
    min_word_len: int = 3
    max_word_len: int = 6
    # Only the template's text reaches this count over `tokenizer_prompts`, so letters of a word are never merged: the
    # task is then about letters, and a reward of 0.3 is reached in minutes instead of hours.
    tokenizer_prompts: int = 3000
    tokenizer_min_frequency: int = 1000
    tokenizer_vocab: int = 512
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    max_steps: int = 400
    measure_every: int = 20
    measure_prompts: int = 256
    max_new_tokens: int = 9
    # A second thread makes these small products slower, not faster.
    threads: int = 1
    target_reward: float = 0.35
    seed: int = 0
    # Trained in bfloat16 with fp32 main weights on a GPU, and refused without one; not repeatable to the bit.
    gpu: bool = False

    @property
    def dense_size(self) -> int:
        """Width of a dense layer's MLP; of the MoE model, which has none, what its config says."""
        return 4 * self.hidden_size if self.experts else self.top_k * self.expert_size

    def digest(self) -> str:
        """Returns 12 hexadecimal digits that differ when any field does."""
        # Models that were cached before a field existed are those of its default.
        fields = {key: value for key, value in asdict(self).items() if key != "gpu" or value}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


# 0.85 billion parameters, of which a token uses a sixth. Its KV rows (4 x 64 x 2 bytes, half of it over two ranks) are
# among those for which SGLang's kernels are commonly built ahead.
_ONE_GPU = Recipe(
    hidden_size=1024,
    layers=16,
    heads=16,
    kv_heads=4,
    experts=64,
    top_k=8,
    expert_size=256,
    max_positions=1024,
    max_word_len=8,
    batch_size=256,
    learning_rate=4e-4,
    warmup_steps=50,
    max_steps=1000,
    measure_every=25,
    max_new_tokens=11,
    gpu=True,
)
RECIPES = {
    "tiny-qwen3moe": Recipe(),
    "tiny-qwen3": Recipe(experts=0),
    "qwen3moe-1b": _ONE_GPU,
    "qwen3-1b": replace(_ONE_GPU, experts=0),
}


def cache_dir() -> Path:
    """Returns the folder of built-in models: `$R3_CACHE`, else `~/.cache/r3`."""
    return Path(os.environ.get("R3_CACHE") or Path.home() / ".cache" / "r3").expanduser().absolute()


def resolve_model(name: str, *, target_reward: float, seed: int) -> Path:
    """Returns the Hugging Face directory of a model, building a `builtin:NAME` first when the cache has none.

    Any other name is a directory. The build shows its progress on stderr; a second process that wants the same model
    waits for the first. Raises ConfigError for a directory without config.json, an unknown built-in name, and a
    `target_reward` that the recipe does not reach.
    """
    if name.startswith(PREFIX):
        return _builtin(name, target_reward, seed)
    path = Path(name).expanduser().absolute()
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"model {name!r}: {path / 'config.json'} does not exist. Name a Hugging Face model directory (a hub model "
            f"is fetched with `hf download OWNER/NAME --local-dir DIR`), or {PREFIX}{next(iter(RECIPES))}"
        )
    return path


def plan_model(name: str, *, target_reward: float, seed: int) -> tuple[Recipe, Path]:
    """Return the recipe of a `builtin:NAME` and the folder that holds it once it is built.

    Raises ConfigError for a name that there is not, and for a target outside [0, 1).
    """
    short = name.removeprefix(PREFIX)
    if short not in RECIPES:
        known = ", ".join(PREFIX + key for key in RECIPES)
        raise ConfigError(f"model {name!r} is no built-in model; there is: {known}")
    if not 0 <= target_reward < 1:
        raise ConfigError(f"target_reward of {name} is {target_reward}; it must be at least 0 and below 1")
    recipe = replace(RECIPES[short], target_reward=float(target_reward), seed=seed)
    return recipe, cache_dir() / f"{short}-{recipe.digest()}"


def is_built(folder: Path) -> bool:
    """Tell whether the folder of a built-in model is complete."""
    return all((folder / file).is_file() for file in MODEL_FILES)


def _builtin(name: str, target_reward: float, seed: int) -> Path:
    recipe, folder = plan_model(name, target_reward=target_reward, seed=seed)
    if is_built(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cache folder {folder.parent} cannot be made ({error}); set R3_CACHE to a writable folder"
        ) from error
    with _locked(folder.with_name(folder.name + ".lock")):
        if not is_built(folder):  # another process may have built it while this one waited
            _build(recipe, name, folder)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock that the kernel drops when this process ends, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is building {path.stem}; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(recipe: Recipe, name: str, folder: Path) -> None:
    """Runs `python -m r3.warmstart` into a folder beside `folder` and renames it; the caller holds the lock."""
    print(f"building {name} into {folder} (once, about a minute)", file=sys.stderr, flush=True)
    partial = folder.with_name(folder.name + ".partial")
    for old in (partial, folder):  # left by a builder that was killed, or damaged
        shutil.rmtree(old, ignore_errors=True)
    command = [sys.executable, "-m", "r3.warmstart", "--recipe", json.dumps(asdict(recipe)), "--out", str(partial)]
    # The same `r3` as this process, whatever the current directory is and however it was installed.
    paths = [str(Path(__file__).absolute().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        **({} if recipe.gpu else {"CUDA_VISIBLE_DEVICES": ""}),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    try:
        # stderr carries progress to the user; stdout only the reason of a failure.
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            reason = done.stdout.strip() or f"exit code {done.returncode}; its output is above"
            raise ConfigError(f"building {name} failed: {reason}")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
