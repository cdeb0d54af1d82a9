"""vLLM over its token endpoint `/inference/v1/generate`, generation only.

Written from the source of vLLM 0.33 (entrypoints/serve/disagg); it has been run against a server that speaks the wire
format, not against vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from r3.errors import EngineError
from r3.rollout.engine import Request, Sampling
from r3.rollout.engines.generation_only import Answer, GenerationOnlyEngine, numbers
from r3.rollout.engines.http import Refused, Server, field_of
from r3.rollout.wire import Decoded, decode_vllm
from r3.types import Finish

_FINISHES: dict[str, Finish] = {"stop": "stop", "length": "length", "abort": "abort"}


class VllmHttpEngine(GenerationOnlyEngine):
    """Adapter of vLLM servers that run with `--enable-return-routed-experts --logprobs-mode processed_logprobs`."""

    kind = "vllm_http"

    def _meet(self, server: Server) -> str:
        """Check the options where the server tells them (`/server_info` is there in development mode only)."""
        release = field_of(server.get("/version"), "version", server.url)
        try:
            info = server.get("/server_info?config_format=json")
        except Refused as error:
            if error.status != 404:
                raise
            info = {}
        found = info.get("vllm_config", {}) if isinstance(info, dict) else {}
        options = found.get("model_config", {}) if isinstance(found, dict) else {}
        faults = []
        if self._config.routing.capture and options.get("enable_return_routed_experts") is False:
            faults.append("runs without routing capture; start it with --enable-return-routed-experts")
        if options.get("logprobs_mode", "processed_logprobs") != "processed_logprobs":
            faults.append(
                f"reports {options['logprobs_mode']}, which are not those of the sampled distribution; start it with "
                "--logprobs-mode processed_logprobs"
            )
        if faults:
            raise EngineError("\n  ".join(f"{server.url} {fault}" for fault in faults))
        return f"vllm {release}"

    def _ask(self, server: Server, number: int, request: Request, sampling: Sampling, capture: bool) -> Answer:
        body = {
            "token_ids": request.tokens.tolist(),
            "sampling_params": _parameters(sampling, number, request.routing_start),
            "stream": False,
        }
        answer = server.post("/inference/v1/generate", body)
        where = f"request {number}: {server.url}"
        choices = field_of(answer, "choices", where)
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise EngineError(f"{where} returned other than one answer to one request (n=1 was asked for)")
        choice = choices[0]
        reason = choice.get("finish_reason")
        if reason not in _FINISHES:
            raise EngineError(f"{where} ended with finish reason {reason!r}")
        response = numbers(choice.get("token_ids") or [], np.int32, f"{where}: token ids")
        rows = (choice.get("logprobs") or {}).get("content") or []
        if [row.get("token") for row in rows] != [f"token_id:{token}" for token in response.tolist()]:
            raise EngineError(
                f"{where} returned log-probs of {len(rows)} tokens that are not the {len(response)} sampled ones"
            )
        details = (answer.get("usage") or {}).get("prompt_tokens_details") or {}
        return Answer(
            response=response,
            logprobs=numbers([row.get("logprob") for row in rows], np.float32, f"{where}: log-probs"),
            finish=_FINISHES[reason],
            cached_tokens=int(details.get("cached_tokens") or 0),
            payload=choice.get("routed_experts"),
        )

    def _decoder(self, start: int) -> Callable[..., Decoded]:
        return partial(decode_vllm, start=start)


def _parameters(sampling: Sampling, number: int, start: int) -> dict[str, object]:
    """Return vLLM's parameters; `routed_experts_prompt_start` is sent only where wanted, older releases lack it."""
    parameters: dict[str, object] = {
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": 0,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
        "n": 1,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logprobs": 0,
        "detokenize": False,
    }
    if sampling.seed is not None:
        # One each: samples of one prompt under one seed would be the same.
        parameters["seed"] = int(np.random.SeedSequence((sampling.seed, number)).generate_state(1)[0])
    return parameters | ({"routed_experts_prompt_start": start} if start else {})
