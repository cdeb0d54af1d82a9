"""Running `sglang.launch_server` processes: token ids in and out over `/generate`, weights over a shared directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from r3.config import Config
from r3.errors import ConfigError, EngineError
from r3.rollout.engine import EngineSpec, Generation, Recorded, Request, Sampling
from r3.rollout.engines.http import Refused, Server, fan_out, field_of, open_servers
from r3.rollout.engines.sglang_answers import read_answer, sampling_params
from r3.rollout.engines.sglang_args import check_output_layer
from r3.rollout.engines.sglang_server import ServerFacts, check_server, read_facts
from r3.rollout.handshake import probe
from r3.rollout.weight_files import exchanged
from r3.routing import Provenance
from r3.types import ModelSpec, WeightVersion
from r3.weights import WeightSource

_FIRST: WeightVersion = 0


class SglangHttpEngine:
    """Adapter of one or several SGLang servers (0.5.17 to 0.5.23) that hold the same checkpoint.

    The servers belong to the user: they are met, used and left running. One worker drives a server, because its weights
    and its cache have one owner.
    """

    def __init__(self, config: Config, model_dir: str | Path, index: int) -> None:
        """Meet the servers and make sure that they hold the weights of `model_dir` as version 0.

        Raises `ConfigError` for another model, `EngineError` for a server that lacks what the run needs.
        """
        rollout = config.rollout
        self._config = config
        self._model_dir = Path(model_dir)
        self._model = ModelSpec.from_directory(model_dir)
        check_output_layer(model_dir)
        self._version: WeightVersion | None = None
        self._servers = open_servers(rollout.urls, rollout.workers, index, rollout.http_timeout_s, rollout.http_retries)
        try:
            facts = [self._meet(server) for server in self._servers]
            releases = sorted({fact.release for fact in facts})
            if len(releases) > 1:
                raise EngineError(f"rollout.urls has servers of SGLang {' and '.join(releases)}; serve one release")
            self._name = f"sglang {releases[0]}"
            self._shares_prefixes = all(fact.shares_prefixes for fact in facts)
            self._version = _FIRST
            self._provenance: Provenance | None = "unknown" if config.routing.provenance == "off" else None
            self._recorded: Recorded | None = None
            self._recorded = self._probe() if config.routing.capture else None
            self._provenance, self._unstamped = self._says_who_wrote()
        except BaseException:
            self.close()
            raise

    def spec(self) -> EngineSpec:
        """Describe the servers, as they were found at the start."""
        config = self._config
        return EngineSpec(
            self._model,
            self._name,
            self._recorded is not None,
            config.rollout.dtype,
            self._recorded,
            updates="directory",
            provenance=self._provenance or "unknown",
            unstamped=self._unstamped,
        )

    def generate(self, requests: Sequence[Request], sampling: Sampling, *, capture: bool) -> list[Generation]:
        """Answer every request, in order; each server takes a contiguous share.

        A record that cannot be decoded is returned as `Generation.defect`. Raises `EngineError` where a server is gone
        or refuses, or tokens, log-probs or weight version are not what they must be.
        """
        if self._version is None:
            raise EngineError(f"{self._name} holds half-loaded weights; load a full set first")
        if self._config.run.deterministic:
            # Which part of a prompt is computed and which comes from the cache decides the order of sums.
            self.flush_cache()
        self._warm_caches(requests)
        parameters = sampling_params(sampling, len(requests))

        def ask(server: Server, number: int, request: Request) -> Generation:
            return self._answer(server, number, request, parameters[number], capture)

        return fan_out(self._servers, requests, self._config.rollout.max_running_requests, ask)

    def load_weights(self, source: WeightSource, version: WeightVersion) -> None:
        """Let every server load all weights from a directory that it shares with this process, then flush its cache.

        Raises `EngineError` with the server's own words; until a full load succeeds nothing is generated.
        """
        self._version = None
        if isinstance(source, Path):
            ModelSpec.from_directory(source).require_same(self._model, str(source), "the engine")
        with exchanged(source, self._model_dir, self._config.weights.exchange_dir) as directory:
            self._each(lambda server: self._load(server, directory, version))
        self._version = version

    def flush_cache(self) -> None:
        """Drop the prefix cache of every server and wait until it confirms that, at most `weights.flush_timeout_s`."""
        self._each(self._flush)

    def close(self) -> None:
        """Close the connections. The servers go on."""
        for server in self._servers:
            server.close()

    def _meet(self, server: Server) -> ServerFacts:
        facts = read_facts(server)
        check_server(facts, self._config, self._model, server.url)
        holds_it = Path(facts.model_path).resolve() == self._model_dir.resolve()
        if holds_it and facts.weight_version == "default":
            # A server that was started without --weight-version and never updated.
            server.post("/update_weight_version", {"new_version": str(_FIRST), "abort_all_requests": False})
            self._check_version(server, _FIRST)
        elif not holds_it or facts.weight_version != str(_FIRST):
            # Updated by an earlier run, or a copy of the checkpoint: only loading it makes the two the same.
            self._load(server, self._model_dir, _FIRST)
        return facts

    def _probe(self) -> Recorded:
        """Probe every server; they must agree."""
        found = [probe(partial(self._ask_one, server), self._model, self._name) for server in self._servers]
        if len(set(found)) > 1:
            raise EngineError(f"rollout.urls has servers that record differently: {found}; start them alike")
        return found[0]

    def _says_who_wrote(self) -> tuple[Provenance, str]:
        """Return what the servers' records say of who wrote their rows, and why when it is `unknown`."""
        wanted = self._config.routing.provenance
        if self._recorded is not None and self._recorded.provenance == "exact":
            return "exact", ""
        if self._recorded is None or wanted == "off":
            return "unknown", "routing.capture is off" if self._recorded is None else "routing.provenance is off"
        reason = f"{self._name} stamps no rows; install this package where the server runs, or give it its plugin"
        if wanted == "require":
            raise ConfigError(f"routing.provenance is require, but {reason}")
        return "unknown", reason

    def _ask_one(self, server: Server, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        parameters = sampling_params(sampling, len(requests))
        return [self._answer(server, i, request, parameters[i], True) for i, request in enumerate(requests)]

    def _warm_caches(self, requests: Sequence[Request]) -> None:
        """Compute prompts that repeat (a group's samples share theirs) once, instead of once per sample.

        SGLang prefills equal prompts that arrive together side by side. The one token that this samples is thrown away.
        """
        prompts = [tuple(request.tokens.tolist()) for request in requests]
        repeated = list(dict.fromkeys(prompts)) if self._shares_prefixes else []
        if not 0 < len(repeated) < len(prompts):
            return
        (parameters,) = sampling_params(Sampling(1.0, 1), 1)

        def ask(server: Server, number: int, prompt: tuple[int, ...]) -> None:
            server.post("/generate", {"input_ids": list(prompt), "sampling_params": parameters})

        fan_out(self._servers, repeated, self._config.rollout.max_running_requests, ask)

    def _answer(
        self, server: Server, index: int, request: Request, parameters: dict[str, Any], capture: bool
    ) -> Generation:
        """Ask one server for one answer, check it and turn it into ours."""
        body: dict[str, Any] = {
            "input_ids": request.tokens.tolist(),
            "sampling_params": parameters,
            "return_logprob": True,
            "return_routed_experts": capture,
            "stream": False,
        }
        if capture and request.routing_start:
            body["routed_experts_start_len"] = request.routing_start
        output = server.post("/generate", body)
        for key in ("meta_info", "output_ids"):
            field_of(output, key, server.url)
        assert self._version is not None
        return read_answer(
            index, request, output, self._model,
            version=self._version, engine=self._name, capture=capture, start=request.routing_start,
            provenance=self._provenance, dtype=None if self._recorded is None else self._recorded.wire_dtype,
        )  # fmt: skip

    def _load(self, server: Server, directory: Path, version: WeightVersion) -> None:
        body = {"model_path": str(directory), "flush_cache": False, "weight_version": str(version)}
        try:
            outcome = server.post("/update_weights_from_disk", body)
        except Refused as error:
            raise EngineError(
                f"{error} (the server must be able to read {directory}; weights.exchange_dir names a shared directory)"
            ) from error
        if not field_of(outcome, "success", server.url):
            raise EngineError(f"{server.url} did not load version {version}: {outcome.get('message')}")
        self._flush(server)
        self._check_version(server, version)

    def _check_version(self, server: Server, version: WeightVersion) -> None:
        found = read_facts(server).weight_version
        if found != str(version):
            raise EngineError(f"{server.url} says that it holds weights {found!r} after it was given version {version}")

    def _flush(self, server: Server) -> None:
        """SGLang refuses a flush (status 400) while its scheduler still holds the last batch, for a moment after."""
        limit = self._config.weights.flush_timeout_s
        deadline = time.monotonic() + limit
        while True:
            try:
                server.order("/flush_cache")
                return
            except Refused as error:
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"{server.url} refused to flush its cache for {limit:g} s (weights.flush_timeout_s): {error}"
                    ) from error
            time.sleep(0.02)

    def _each(self, work: Callable[[Server], None]) -> None:
        fan_out(self._servers, self._servers, 1, lambda server, number, own: work(own))
