"""What the bridge asks of an inference engine, and the small types that cross that line."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from r3.config import Config
from r3.errors import ConfigError, EngineError, MissingRoutingError, RoutingError
from r3.routing import RoutingTrace, TokenIds
from r3.types import Finish, ModelSpec, WeightSource, WeightVersion


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine says of itself: model, name with version, is routing capture on, dtype of its weights."""

    model: ModelSpec
    engine: str
    capture: bool
    dtype: str


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt. `tokens`: int32 `[P]`."""

    tokens: TokenIds


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. There is no top-p, top-k, min-p or penalty: the recorded log-probs must be those of the whole
    distribution at `temperature`. `greedy` takes the likeliest token and reports log-probs at temperature 1.

    `seed` (32 bits) restarts the engine's random numbers where it can, so that a resumed run draws what an
    uninterrupted one would; under `run.deterministic` equal weights, requests and seed give equal answers.
    """

    temperature: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    greedy: bool = False
    ignore_eos: bool = False
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer. `tokens`: int32 `[S]`, prompt and response through the stop token; `logprobs`: float32
    `[S - prompt_len]`, nats. `decode_s`: seconds in which the adapter decoded and checked the record.

    `routing`: the record of all S-1 input tokens, None where it was not asked for. `defect`: why the record that came
    back cannot be used; whether that stops the run is the caller's choice (`routing.on_error`). `cached_tokens`: prompt
    tokens whose KV, and with it whose routing, came from the engine's prefix cache.
    """

    tokens: TokenIds
    prompt_len: int
    logprobs: NDArray[np.float32]
    routing: RoutingTrace | None
    finish: Finish
    weight_version: WeightVersion
    cached_tokens: int = 0
    defect: RoutingError | None = None
    decode_s: float = 0.0


class Engine(Protocol):
    """An inference engine inside the rollout process.

    A class of your own is named as `rollout.engine: module:Class`; it is constructed with `(config, model_dir, index)`,
    where `index` is the number of the rollout worker, and holds the weights of `model_dir` as version 0.
    """

    def spec(self) -> EngineSpec:
        """Describe the engine that is running."""
        ...

    def generate(self, requests: Sequence[Request], sampling: Sampling, *, capture: bool) -> Iterable[Generation]:
        """Answer every request, in order; record routing only when `capture` is set. Raises `EngineError`.

        An iterator that hands out each answer once it is there lets the worker check it while the engine goes on.
        """
        ...

    def load_weights(self, source: WeightSource, version: WeightVersion) -> None:
        """Replace all weights, drop every cache made with the old ones, and stamp what follows with `version`.

        Raises `EngineError` unless both are known to have happened.
        """
        ...

    def flush_cache(self) -> None:
        """Drop the prefix cache; raise `EngineError` unless it is known to be empty."""
        ...

    def close(self) -> None:
        """Stop the engine and its processes."""
        ...


def open_engine(config: Config, model_dir: str | Path, index: int) -> Engine:
    """Start the engine that `rollout.engine` names; raise `ConfigError` for an unknown one."""
    name = config.rollout.engine
    if name == "sglang":
        from r3.rollout.engines.sglang import SglangEngine

        return SglangEngine(config, model_dir, index)
    module_name, separator, class_name = name.partition(":")
    if not separator:
        raise ConfigError(f"rollout.engine={name!r} is unknown; use 'sglang' or 'module:Class' of your own")
    try:
        make = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"rollout.engine={name}: {error}") from error
    engine: Engine = make(config, model_dir, index)
    return engine


def stop_token_ids(model_dir: str | Path) -> tuple[int, ...]:
    """Return the end-of-sequence ids of `generation_config.json` and `config.json`, ascending.

    Raises `ConfigError` when neither names one, because every answer would then run to its length limit.
    """
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = Path(model_dir) / name
        if path.is_file():
            found = json.loads(path.read_text()).get("eos_token_id")
            ids.update(found if isinstance(found, list) else [] if found is None else [found])
    if not ids:
        raise ConfigError(f"{model_dir} names no eos_token_id in generation_config.json or config.json; add it")
    return tuple(sorted(ids))


def check_generation(request: Request, found: Generation, spec: EngineSpec, *, capture: bool) -> RoutingError | None:
    """Check what any engine returned for one request.

    Raises `EngineError` where tokens or log-probs break the contract; returns the `RoutingError` of a record that is
    missing (`MissingRoutingError`) or does not fit, None when all is well. An aborted answer without tokens legally has
    no record.
    """
    prompt_len, total = len(request.tokens), len(found.tokens)
    if found.prompt_len != prompt_len or not np.array_equal(found.tokens[:prompt_len], request.tokens):
        raise EngineError("the engine answered with other prompt tokens than those it was given")
    if len(found.logprobs) != total - prompt_len:
        raise EngineError(f"{len(found.logprobs)} log-probs came back for {total - prompt_len} sampled tokens")
    if not np.isfinite(found.logprobs).all():
        raise EngineError(f"log-prob of sampled token {int(np.argmin(np.isfinite(found.logprobs)))} is not finite")
    if not capture:
        return None
    if found.defect is not None:
        return found.defect
    if found.routing is None:
        return (
            None
            if found.finish == "abort" and total == prompt_len
            else MissingRoutingError("no routing came back although it was asked for; switch capture on at the engine")
        )
    return _misfit(found.routing, total, spec.model)


def _misfit(routing: RoutingTrace, total: int, model: ModelSpec) -> RoutingError | None:
    if routing.rows != total - 1:
        return RoutingError(f"{routing.rows} routing rows for {total} tokens; {total - 1} are required")
    expected = (model.moe_layers, model.num_experts, model.top_k)
    found = (routing.layers, routing.num_experts, routing.top_k)
    if found != expected:
        return RoutingError(f"routing has (layers, experts, top-k) {found}, the model {expected}")
    return None
