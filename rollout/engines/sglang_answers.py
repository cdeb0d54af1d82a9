"""What SGLang is sent for a request and what it answers, the same in process and over HTTP."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from r3.errors import EngineError, RoutingError
from r3.rollout.engine import Generation, Request, Sampling
from r3.rollout.engines.sglang_returned import read_returned
from r3.rollout.provenance import StaleRows, cut, with_provenance
from r3.rollout.segment import Owner, Ticket
from r3.rollout.sglang_plugin.tickets import ticket_of
from r3.rollout.wire import Decoded, Wire, decode_sglang
from r3.routing import Provenance, RoutingTrace, RowsSeen, TokenIds
from r3.types import Finish, ModelSpec, WeightVersion

_FINISHES: dict[str, Finish] = {"stop": "stop", "length": "length", "abort": "abort"}


def sampling_params(sampling: Sampling, requests: int) -> list[dict[str, Any]]:
    """Return SGLang's parameters for every request.

    Every parameter that shapes the distribution is sent, because a checkpoint's generation_config may set others.
    `sampling_seed` is read under `enable_deterministic_inference` alone, which `run.deterministic` sets on a GPU.
    """
    seeds: list[dict[str, int]] = [{}] * requests
    if sampling.seed is not None:
        words = np.random.SeedSequence(sampling.seed).generate_state(requests)
        seeds = [{"sampling_seed": int(word)} for word in words]
    common = {
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
        "max_new_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
        "n": 1,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_new_tokens": 0,
    }
    return [common | seed for seed in seeds]


def read_answer(
    index: int,
    request: Request,
    output: dict[str, Any],
    model: ModelSpec,
    *,
    version: WeightVersion,
    engine: str,
    capture: bool,
    start: int,
    provenance: Provenance | None,
    segment: Owner | None = None,
    dtype: str | None = None,
    sound: Mapping[Ticket, RowsSeen] = MappingProxyType({}),
) -> Generation:
    """Check one answer of SGLang and turn it into ours; SGLang was asked for rows from `start` on.

    `version`: the weights that the engine was given last; `provenance`: what it said of its rows, None where that is
    not known yet; `segment`: the shared memory through which rows may come, None where they come with the answer;
    `dtype`: of ids that come with the answer, None where their number must tell; `sound`: what an `EarlyLook` found. A
    record that cannot be used is `Generation.defect`. Raises `EngineError` for tokens, log-probs, finish reason or
    weight version that are not what they must be.
    """
    meta = output["meta_info"]
    response, logprobs = _sampled(index, output, model, engine)
    tokens = np.concatenate([request.tokens, response])
    finish = _finish_of(index, meta, engine)
    version = _checked_version(index, meta, version, engine)
    routing: RoutingTrace | None = None
    wire: Wire | None = None
    stale: tuple[StaleRows, ...] = ()
    defect: RoutingError | None = None
    begin = time.perf_counter()
    if capture and (len(response) or finish != "abort"):
        try:
            if finish == "abort" and not _has_rows(meta):
                # SGLang answers for a request in its queue without rows, also for one that was retracted (0.5.23,
                # `_handle_abort_req`): the KV is gone.
                raise RoutingError(
                    f"request {index}: aborted in the queue with {len(response)} tokens sampled; its KV was released "
                    "and with it every routing row"
                )
            decoded, stamps = _decoded(
                meta, segment, tokens, model,
                request=index, weight_version=version, engine=engine, start=start, dtype=dtype,
                sound=sound,
            )  # fmt: skip
            wire = decoded.wire
            routing, stale = _proven(
                index, decoded.routing, stamps, tokens, request, start=start, engine=engine, expected=provenance
            )
        except RoutingError as error:
            defect = error
    return Generation(
        tokens=tokens,
        prompt_len=len(request.tokens),
        logprobs=logprobs,
        routing=routing,
        finish=finish,
        weight_version=version,
        cached_tokens=int(meta.get("cached_tokens") or 0),
        defect=defect,
        wire=wire,
        stale=stale,
        decode_s=time.perf_counter() - begin,
    )


def _has_rows(meta: Mapping[str, Any]) -> bool:
    return meta.get("routed_experts") is not None or ticket_of(meta) is not None


def _decoded(
    meta: Mapping[str, Any],
    segment: Owner | None,
    tokens: TokenIds,
    model: ModelSpec,
    *,
    request: int,
    weight_version: WeightVersion,
    engine: str,
    start: int,
    dtype: str | None,
    sound: Mapping[Ticket, RowsSeen],
) -> tuple[Decoded, Mapping[str, Any] | bytes]:
    """Return the record of one answer, however it came back, and what holds its stamps."""
    ticket = ticket_of(meta)
    if ticket is None:
        sent = decode_sglang(
            meta.get("routed_experts"), tokens, model,
            request=request, weight_version=weight_version, engine=engine, start=start, dtype=dtype,
        )  # fmt: skip
        return sent, meta
    if segment is None:
        raise RoutingError(
            f"request {request}: {engine} left its rows in shared memory of another process, whose segment this one "
            "does not hold; let that process stop, or give it routing.shared_memory=off"
        )
    return read_returned(
        segment, ticket, tokens, model,
        request=request, weight_version=weight_version, engine=engine, start=start, sound=sound,
    )  # fmt: skip


def _sampled(index: int, output: dict[str, Any], model: ModelSpec, engine: str) -> tuple[TokenIds, NDArray[np.float32]]:
    """Return the sampled tokens `[R]` int32 and their log-probs `[R]` float32; SGLang's rows are (log-prob, id, text).

    Raises `EngineError` unless there is one log-prob for each token and every token is in the vocabulary.
    """
    response = np.asarray(output["output_ids"], dtype=np.int32)
    rows = output["meta_info"].get("output_token_logprobs") or []
    if [row[1] for row in rows] != response.tolist():
        raise EngineError(
            f"request {index}: {engine} returned log-probs of {len(rows)} tokens that are not the "
            f"{len(response)} sampled ones"
        )
    if len(response) and not 0 <= response.min() <= response.max() < model.vocab_size:
        raise EngineError(f"request {index}: a token id is outside the vocabulary of {model.vocab_size}")
    return response, np.array([row[0] for row in rows], dtype=np.float32)


def _finish_of(index: int, meta: dict[str, Any], engine: str) -> Finish:
    """Return why an answer ended; raise `EngineError` for a reason that means nothing here."""
    reason = (meta.get("finish_reason") or {}).get("type")
    if reason not in _FINISHES:
        raise EngineError(f"request {index}: {engine} ended with finish reason {reason!r}")
    return _FINISHES[reason]


def _checked_version(index: int, meta: dict[str, Any], loaded: WeightVersion, engine: str) -> WeightVersion:
    """Return `loaded`; SGLang stamps answers itself, and one of other weights than the last loaded is never used."""
    if meta.get("weight_version") != str(loaded):
        raise EngineError(
            f"request {index}: {engine} answered with weights {meta.get('weight_version')!r}, loaded are {loaded}"
        )
    return loaded


def _proven(
    index: int,
    decoded: RoutingTrace,
    meta: Mapping[str, Any] | bytes,
    tokens: TokenIds,
    request: Request,
    *,
    start: int,
    engine: str,
    expected: Provenance | None,
) -> tuple[RoutingTrace, tuple[StaleRows, ...]]:
    """Return the rows that the request asked for out of those from `start` on, with the versions that stamps prove.

    `expected`: what the engine said of itself; None where that is not known yet, then stamps are read where they are.
    Raises `RoutingError` for stamps that do not fit, and for an answer without any from an engine that stamps.
    """
    found: RoutingTrace = decoded
    stale: tuple[StaleRows, ...] = ()
    if expected != "unknown":
        prompt_len = len(request.tokens)
        try:
            found, stale = with_provenance(found, meta, num_tokens=len(tokens), prompt_len=prompt_len, begin=start)
        except RoutingError as error:
            raise RoutingError(f"request {index}: {error}") from error
        if expected == "exact" and len(tokens) > prompt_len and found.provenance != "exact":
            raise RoutingError(f"request {index}: {engine} stamps its rows, but none of this answer are stamped")
    if start < request.routing_start:
        found = found.clip(request.routing_start, len(tokens), tokens)
        stale = cut(stale, request.routing_start)
    return found, stale
