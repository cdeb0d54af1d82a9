"""What the bridge asks of an inference engine, and the small types that cross that line."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from r3.config import Config
from r3.errors import ConfigError, EngineError, MissingRoutingError, RoutingError
from r3.rollout.provenance import StaleRows
from r3.rollout.wire.common import Wire
from r3.routing import Provenance, RoutingTrace, TokenIds
from r3.types import Finish, ModelSpec, WeightVersion
from r3.weights import BroadcastGroup, Transport, WeightPart, WeightSource

# Generation-only servers: they answer, but nothing that they offer replaces their weights.
GENERATION_ONLY = ("lightllm_http", "vllm_http")
ENGINES = ("sglang", "sglang_http", *GENERATION_ONLY)
UpdateKind = Literal["tensors", "directory", "none"]


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the records of an engine hold, as its options say or a probe found; None where it is not known.

    `layers`: global index of each recorded layer; `ids`: logical experts, or physical slots after a remap (EPLB);
    `wire_dtype`: numpy dtype name of the ids on the wire; `honours_start`: `Request.routing_start` shortens the answer;
    `cached_rows`: the rows of a prompt that came from the prefix cache are in the record; `provenance`: whether rows
    are stamped with the forward passes that wrote them.
    """

    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    ids: Literal["logical", "physical"] = "logical"
    wire_dtype: str | None = None
    honours_start: bool | None = None
    cached_rows: bool | None = None
    provenance: Provenance = "unknown"


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine says of itself: model, name with version, is routing capture on, dtype of its weights.

    `recorded`: what its records hold, None from an engine that does not say. `updates`: how it takes new weights.
    `transports`: the ways in which they reach it; other than the object store only an engine that is also a
    `StreamedEngine`, in each of whose `ranks` tensor-parallel processes they arrive. `unverified`: why it does not
    compare what arrived with what was sent, empty when it does.
    `provenance`: `exact` when it stamps rows with their forward passes, else `unknown`, and why in `unstamped`.
    `shared_memory`: rows come back through shared memory; else with the answers, and why in `unshared`.
    `copies`: how the ids of a pass come to the engine's buffer, in words, where that is known and makes a difference.
    """

    model: ModelSpec
    engine: str
    capture: bool
    dtype: str
    recorded: Recorded | None = None
    updates: UpdateKind = "tensors"
    transports: tuple[Transport, ...] = ("object_store",)
    ranks: int = 1
    unverified: str = "the engine does not compare the weights that arrive with those that were sent"
    provenance: Provenance = "unknown"
    unstamped: str = "the engine says nothing of who wrote its routing rows"
    shared_memory: bool = False
    unshared: str = "the engine sends its rows with its answers"
    copies: str = ""

    def describe_rows(self) -> str:
        """Return in words who wrote the rows and how they come back."""
        if not self.capture:
            return "no routing is captured"
        proof = f"provenance {self.provenance}" + (f" ({self.unstamped})" if self.unstamped else "")
        way = "through shared memory" if self.shared_memory else f"with the answers ({self.unshared})"
        return f"{proof}; rows come {way}" + (f"; {self.copies}" if self.copies else "")


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt. `tokens`: int32 `[P]`.

    `routing_start`: position of the first row that the record shall have, at most `P`. A later turn passes
    `len(previous answer) - 1`: the last token of the answer before it gets its row now (`r3.rollout.turns`).
    """

    tokens: TokenIds
    routing_start: int = 0


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

    `routing`: the record of the input tokens from `Request.routing_start` to S-2, None where it was not asked for.
    `defect`: why the record that came back cannot be used; whether that stops the run is the caller's choice
    (`routing.on_error`). `cached_tokens`: prompt tokens whose KV, and with it whose routing, came from the engine's
    prefix cache. `wire`: how the record travelled, None from an engine that does not say. `stale`: rows that are not
    those behind the log-probs that depend on them, known only when the record's provenance is `exact`; what to do about
    them is the caller's choice (`routing.on_stale`).
    """

    tokens: TokenIds
    prompt_len: int
    logprobs: NDArray[np.float32]
    routing: RoutingTrace | None
    finish: Finish
    weight_version: WeightVersion
    cached_tokens: int = 0
    defect: RoutingError | None = None
    wire: Wire | None = None
    stale: tuple[StaleRows, ...] = ()
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
        """Drop the prefix cache; raise `EngineError` unless it is known to be empty.

        An engine that takes no weight updates may keep it: nothing in it is ever stale.
        """
        ...

    def close(self) -> None:
        """Stop the engine and its processes."""
        ...


@runtime_checkable
class StreamedEngine(Protocol):
    """An engine that also takes weights bucket by bucket, from the trainer's memory or from a broadcast group.

    What `Engine.load_weights` promises holds from `end_weights` on. Every method raises `EngineError`.
    """

    def begin_weights(self, version: WeightVersion) -> None:
        """Begin an update; one that was left half-way is given up."""
        ...

    def load_part(self, part: WeightPart) -> None:
        """Load one bucket; when it returns, no rank reads the bucket's memory any more."""
        ...

    def end_weights(self, checksums: Sequence[int]) -> None:
        """End the update; raise `EngineError` where what arrived is known to differ from what the checksums say."""
        ...

    def join_group(self, group: BroadcastGroup, offset: int) -> None:
        """Join a broadcast group with every rank, from rank `offset` on."""
        ...

    def leave_group(self, name: str) -> None:
        """Leave a broadcast group."""
        ...


def open_engine(config: Config, model_dir: str | Path, index: int) -> Engine:
    """Start the engine that `rollout.engine` names, and check what it can do against what the run asks of it.

    Raises `ConfigError` for an unknown engine and for one without the shared memory that the config requires,
    `EngineError` for one that lacks what is needed.
    """
    from r3.rollout.handshake import require

    engine = _make_engine(config, model_dir, index)
    try:
        spec = engine.spec()
        require(spec, capture=config.routing.capture)
        if config.routing.shared_memory == "require" and not spec.shared_memory:
            raise ConfigError(f"routing.shared_memory is require, but {spec.engine}: {spec.unshared}")
    except (ConfigError, EngineError):
        engine.close()
        raise
    return engine


def _make_engine(config: Config, model_dir: str | Path, index: int) -> Engine:
    """Import only the adapter that is asked for: each brings its own dependencies."""
    name = config.rollout.engine
    if name == "sglang":
        from r3.rollout.engines.sglang import SglangEngine

        return SglangEngine(config, model_dir, index)
    if name == "sglang_http":
        from r3.rollout.engines.sglang_http import SglangHttpEngine

        return SglangHttpEngine(config, model_dir, index)
    if name == "lightllm_http":
        from r3.rollout.engines.lightllm_http import LightllmHttpEngine

        return LightllmHttpEngine(config, model_dir, index)
    if name == "vllm_http":
        from r3.rollout.engines.vllm_http import VllmHttpEngine

        return VllmHttpEngine(config, model_dir, index)
    module_name, separator, class_name = name.partition(":")
    if not separator:
        raise ConfigError(unknown_engine(name))
    try:
        make = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"rollout.engine={name}: {error}") from error
    engine: Engine = make(config, model_dir, index)
    return engine


def unknown_engine(name: str) -> str:
    """Return the message for an engine name that means nothing."""
    known = ", ".join(repr(engine) for engine in ENGINES)
    return f"rollout.engine={name!r} is unknown; use {known} or 'module:Class' of your own"


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
    return _misfit(found.routing, request.routing_start, total, spec.model)


def _misfit(routing: RoutingTrace, start: int, total: int, model: ModelSpec) -> RoutingError | None:
    if routing.rows != total - 1 - start:
        return RoutingError(
            f"{routing.rows} routing rows for {total} tokens"
            + (f" from position {start} on" if start else "")
            + f"; {total - 1 - start} are required"
        )
    if routing.rows and routing.spans[0].begin != start:
        return RoutingError(f"the record begins at position {routing.spans[0].begin}; {start} was asked for")
    expected = (model.moe_layers, model.num_experts, model.top_k)
    found = (routing.layers, routing.num_experts, routing.top_k)
    if found != expected:
        return RoutingError(f"routing has (layers, experts, top-k) {found}, the model {expected}")
    return None
