"""What the adapters of generation-only servers share: one POST per request, records through the engine's decoder."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from r3.config import Config
from r3.errors import EngineError, RoutingError
from r3.rollout.engine import EngineSpec, Generation, Recorded, Request, Sampling
from r3.rollout.engines.http import Server, fan_out, open_servers
from r3.rollout.handshake import probe
from r3.rollout.wire import Decoded
from r3.routing import TokenIds
from r3.types import Finish, ModelSpec, WeightVersion
from r3.weights import WeightSource

VERSION: WeightVersion = 0  # of all answers: the weights never change


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer as the server gave it: tokens `[R]` int32, log-probs `[R]` float32, and the undecoded record."""

    response: TokenIds
    logprobs: NDArray[np.float32]
    finish: Finish
    cached_tokens: int
    payload: Any


class GenerationOnlyEngine(ABC):
    """Base of an adapter whose server cannot be given new weights.

    A subclass says how a request and its answer look on the wire.
    """

    kind: str

    def __init__(self, config: Config, model_dir: str | Path, index: int) -> None:
        """Meet the servers and probe their capture; raise `ConfigError` or `EngineError`."""
        rollout = config.rollout
        self._config = config
        self._model = ModelSpec.from_directory(model_dir)
        self._servers = open_servers(rollout.urls, rollout.workers, index, rollout.http_timeout_s, rollout.http_retries)
        self._recorded: Recorded | None = None
        try:
            releases = sorted({self._meet(server) for server in self._servers})
            if len(releases) > 1:
                raise EngineError(f"rollout.urls has servers of {' and '.join(releases)}; serve one release")
            self._name = releases[0]
            if config.routing.capture:
                found = [probe(partial(self._ask_one, server), self._model, self._name) for server in self._servers]
                if len(set(found)) > 1:
                    raise EngineError(f"rollout.urls has servers that record differently: {found}; start them alike")
                self._recorded = found[0]
        except BaseException:
            self.close()
            raise

    def spec(self) -> EngineSpec:
        """Describe the servers, as they were found at the start."""
        return EngineSpec(
            self._model,
            self._name,
            self._recorded is not None,
            self._config.rollout.dtype,
            self._recorded,
            updates="none",
        )

    def generate(self, requests: Sequence[Request], sampling: Sampling, *, capture: bool) -> list[Generation]:
        """Answer every request, in order; each server takes a contiguous share.

        A record that cannot be decoded is returned as `Generation.defect`. Raises `EngineError`.
        """

        def ask(server: Server, number: int, request: Request) -> Generation:
            return self._answer(server, number, request, sampling, capture)

        return fan_out(self._servers, requests, self._config.rollout.max_running_requests, ask)

    def load_weights(self, source: WeightSource, version: WeightVersion) -> None:
        """Raise `EngineError`: there is no update whose success could be verified."""
        raise EngineError(
            f"rollout.engine={self.kind} is generation only: its server has no weight update that can be verified; "
            "train with rollout.engine sglang or sglang_http"
        )

    def flush_cache(self) -> None:  # noqa: B027  (nothing is what it does)
        """Do nothing: the weights never change, so a cached prefix is never stale."""

    def close(self) -> None:
        """Close the connections. The servers go on."""
        for server in self._servers:
            server.close()

    @abstractmethod
    def _meet(self, server: Server) -> str:
        """Return name and release of a server; raise `EngineError` where an option of it cannot be used."""

    @abstractmethod
    def _ask(self, server: Server, number: int, request: Request, sampling: Sampling, capture: bool) -> Answer:
        """Send one request and read the answer, all but its record."""

    @abstractmethod
    def _decoder(self, start: int) -> Callable[..., Decoded]:
        """Return the decoder of this engine's payload, of rows from `start` on."""

    def _ask_one(self, server: Server, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        return [self._answer(server, i, request, sampling, True) for i, request in enumerate(requests)]

    def _answer(self, server: Server, number: int, request: Request, sampling: Sampling, capture: bool) -> Generation:
        answer = self._ask(server, number, request, sampling, capture)
        tokens = np.concatenate([request.tokens, answer.response]).astype(np.int32)
        if len(answer.response) and not 0 <= answer.response.min() <= answer.response.max() < self._model.vocab_size:
            raise EngineError(f"request {number}: a token id is outside the vocabulary of {self._model.vocab_size}")
        begin = time.perf_counter()
        decoded: Decoded | None = None
        defect: RoutingError | None = None
        if capture and not (answer.finish == "abort" and not len(answer.response)):
            try:
                decoded = self._decoder(request.routing_start)(
                    answer.payload, tokens, self._model, request=number, weight_version=VERSION, engine=self._name
                )
            except RoutingError as error:
                defect = error
        return Generation(
            tokens=tokens,
            prompt_len=len(request.tokens),
            logprobs=answer.logprobs,
            routing=decoded.routing if decoded else None,
            finish=answer.finish,
            weight_version=VERSION,
            cached_tokens=answer.cached_tokens,
            defect=defect,
            wire=decoded.wire if decoded else None,
            decode_s=time.perf_counter() - begin,
        )


def numbers(values: Sequence[object], kind: type[np.generic], what: str) -> NDArray[Any]:
    """Return a flat array of JSON numbers; raise `EngineError` for anything else among them."""
    wanted = (int,) if np.issubdtype(kind, np.integer) else (int, float)
    if not all(isinstance(value, wanted) and not isinstance(value, bool) for value in values):
        raise EngineError(f"{what} are not all numbers")
    try:
        return np.array(values, dtype=kind)
    except OverflowError as error:
        raise EngineError(f"{what} do not fit {np.dtype(kind)}: {error}") from error
