"""What a running SGLang server says of itself, held against what the run needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r3.config import Config
from r3.errors import ConfigError, EngineError
from r3.rollout.engines.http import Refused, Server, field_of
from r3.rollout.engines.sglang_args import REFUSALS, check_release
from r3.types import ModelSpec


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """Answers of `/server_info` and `/model_info`; `arguments` are the resolved `ServerArgs`."""

    release: str
    model_path: str
    model_type: str | None
    weight_version: str
    preferred_sampling: object
    arguments: Mapping[str, Any]

    @property
    def shares_prefixes(self) -> bool:
        """Is the radix cache on?"""
        return not self.arguments.get("disable_radix_cache", False)


def read_facts(server: Server) -> ServerFacts:
    """Ask a server for its options and its model; raise `EngineError` when it is no SGLang server."""
    arguments = _either(server, "/server_info", "/get_server_info")
    model = _either(server, "/model_info", "/get_model_info")
    return ServerFacts(
        release=str(field_of(arguments, "version", server.url)),
        model_path=str(field_of(model, "model_path", server.url)),
        model_type=model.get("model_type"),
        weight_version=str(field_of(model, "weight_version", server.url)),
        preferred_sampling=model.get("preferred_sampling_params"),
        arguments=arguments,
    )


def check_server(facts: ServerFacts, config: Config, model: ModelSpec, url: str) -> None:
    """Raise `ConfigError` for another release or model, `EngineError` that lists every option that cannot be used."""
    check_release(facts.release)
    _check_model(facts, model, url)
    capture = config.routing.capture
    arguments = facts.arguments
    faults = []
    if capture and not arguments.get("enable_return_routed_experts"):
        faults.append("runs without routing capture; start it with --enable-return-routed-experts")
    faults += [
        f"runs with {_flag(refusal.option)} {arguments[refusal.option]!r}, which is refused: {refusal.reason}"
        for refusal in REFUSALS
        if refusal.option in arguments
        and refusal.option != "enable_return_routed_experts"
        and refusal.over_http
        and (capture or refusal.breaks != "capture")
        and refusal.applies(arguments[refusal.option])
    ]
    if arguments.get("dtype") not in (None, "auto", config.rollout.dtype):
        faults.append(
            f"runs with --dtype {arguments['dtype']}, rollout.dtype is {config.rollout.dtype}; set one of them"
        )
    if config.run.deterministic and not arguments.get("enable_deterministic_inference"):
        faults.append("lacks --enable-deterministic-inference, which run.deterministic needs")
    if facts.preferred_sampling:
        faults.append("has --preferred-sampling-params, which would change the sampled distribution")
    if faults:
        raise EngineError("\n  ".join(f"{url} {fault}" for fault in faults))


def _check_model(facts: ServerFacts, model: ModelSpec, url: str) -> None:
    """Compare checkpoints where this host can read the server's, else the little that the server says."""
    if (Path(facts.model_path) / "config.json").is_file():
        model.require_same(ModelSpec.from_directory(facts.model_path), "model.path", f"{url} ({facts.model_path})")
    elif facts.model_type not in (None, model.model_type):
        raise ConfigError(f"{url} serves a {facts.model_type!r}, model.path is a {model.model_type!r}")


def _either(server: Server, path: str, older: str) -> dict[str, Any]:
    try:
        answer = server.get(path)
    except Refused as error:
        if error.status != 404:
            raise
        answer = server.get(older)
    if not isinstance(answer, dict):
        raise EngineError(f"{server.url}{path} answered with a {type(answer).__name__}; is it an SGLang server?")
    return answer


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")
