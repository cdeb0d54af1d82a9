"""What can be known to fail before anything starts: config against model files, engine and installed packages."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r3.config import Config
from r3.errors import ConfigError
from r3.plan import ModelSize, gpu_faults, model_size, plan
from r3.rollout.engine import ENGINES, GENERATION_ONLY, stop_token_ids, unknown_engine
from r3.rollout.engines.sglang_args import check_environment, check_output_layer, engine_kwargs
from r3.trainer.architecture import require_layout

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_WITHOUT_CUDA = "; on a machine without CUDA run scripts/quickstart.sh instead, which installs what runs there"


@dataclass(frozen=True, slots=True)
class Need:
    """A package that a run imports, the extra that brings it, and the key that asks for it."""

    package: str
    extra: str
    reason: str


def check(config: Config, *, trains: bool = True, planned: bool = False) -> ModelSize:
    """Check a config against its model's files and its engine's refusals, and return the model's size.

    `trains`: the engine is to take weight updates, which not every engine can. `planned`: nothing is to run yet, so a
    model's `config.json` is enough. Imports nothing heavy and starts nothing. Raises `ConfigError` with everything
    found.
    """
    faults: list[str] = []
    if trains and config.rollout.engine in GENERATION_ONLY:
        faults.append(
            f"rollout.engine={config.rollout.engine} is generation only: its server has no weight update that R3 can "
            "verify, so it would answer with the first weights for the whole run; train with sglang or sglang_http"
        )
    size = _collect(faults, lambda: model_size(config, planned=planned))
    if size is not None:
        directory = size.directory
        if directory is not None and size.counted:
            _collect(faults, lambda: _check_files(directory))
        faults += _check_lengths(config, size)
        arch = size.arch
        if config.routing.capture:
            _collect(faults, lambda: arch.spec.require_routers(config.model.path))
        found = len(faults)
        _collect(faults, lambda: require_layout(arch, config.trainer))
        if len(faults) == found:  # a plan of a layout that cannot be says nothing
            faults += gpu_faults(config, plan(config, size))
    if config.rollout.engine == "sglang":
        where = size.directory if size else None
        if where is not None:
            _collect(faults, lambda: check_output_layer(where))
        _collect(faults, lambda: engine_kwargs(config, str(where), 0))
        _collect(faults, check_environment)
    elif config.rollout.engine not in ENGINES and ":" not in config.rollout.engine:
        faults.append(unknown_engine(config.rollout.engine))
    if config.task.kind == "jsonl" and not Path(str(config.task.path)).is_file():
        faults.append(f"task.path={config.task.path} is no file; name one with a JSON object per line")
    if faults or size is None:
        raise ConfigError("\n  ".join(faults))
    return size


def check_installed(config: Config) -> None:
    """Raise `ConfigError` with the pip line for every package that the run will import and that is not there.

    For a local run only: on a cluster the driver's machine need not have what the actors have.
    """
    missing = [need for need in needs(config) if not _is_importable(need.package)]
    if missing:
        extras = ",".join(sorted({need.extra for need in missing}))
        names = ", ".join(f"{need.package} ({need.reason})" for need in missing)
        hint = _WITHOUT_CUDA if {"sglang", "megatron"} & {need.extra for need in missing} else ""
        raise ConfigError(f"not installed: {names}. pip install 'rollout-router-replay[{extras}]'{hint}")


def needs(config: Config) -> Iterator[Need]:
    """Yield every package outside the base installation that a run of this config imports."""
    for package in ("torch", "megatron.core", "transformers", "safetensors"):
        yield Need(package, "megatron", "the trainer")
    if config.rollout.engine == "sglang":
        yield Need("sglang", "sglang", "rollout.engine=sglang")
    elif config.rollout.engine in ENGINES:
        for package in ("httpx", "tenacity"):
            yield Need(package, "http", f"rollout.engine={config.rollout.engine}")
    if config.task.kind == "reasoning_gym":
        yield Need("reasoning_gym", "tasks", "task.kind=reasoning_gym")
    elif config.task.verifier == "math" and config.task.reward is None:
        yield Need("math_verify", "tasks", "task.verifier=math")
    if config.tracking.wandb == "online" and (os.environ.get("WANDB_MODE") or "online") == "online":
        yield Need("wandb", "wandb", "tracking.wandb=online")


def _is_importable(package: str) -> bool:
    """Look for a package without importing it, nor the package that holds it."""
    top, _, inner = package.partition(".")
    found = importlib.util.find_spec(top)
    if found is None or not inner:
        return found is not None
    return any((Path(folder) / inner).is_dir() for folder in found.submodule_search_locations or ())


def _check_files(directory: Path) -> None:
    if not any((directory / name).is_file() for name in _TOKENIZERS):
        raise ConfigError(f"{directory} holds no tokenizer ({', '.join(_TOKENIZERS)}); copy it from the original model")
    stop_token_ids(directory)


def _check_lengths(config: Config, size: ModelSize) -> Iterator[str]:
    answer, slots = config.rollout.max_new_tokens, config.rollout.max_total_tokens
    if answer >= size.arch.max_positions:
        yield (
            f"rollout.max_new_tokens={answer} leaves no room for a prompt in the model's {size.arch.max_positions} "
            "positions (max_position_embeddings); lower it"
        )
    if slots is not None and answer >= slots:
        yield f"rollout.max_new_tokens={answer} does not fit rollout.max_total_tokens={slots}; raise the second"


def _collect(faults: list[str], attempt: Callable[[], Any]) -> Any:
    try:
        return attempt()
    except ConfigError as error:
        faults.append(str(error))
        return None
