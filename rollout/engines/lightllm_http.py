"""LightLLM over its `/generate`, generation only.

Written from LightLLM's documents and source (docs/r3_routing_capture.md, server/api_lightllm.py); it has been run
against a server that speaks the wire format, not against LightLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from r3.errors import EngineError
from r3.rollout.engine import Request, Sampling
from r3.rollout.engines.generation_only import Answer, GenerationOnlyEngine, numbers
from r3.rollout.engines.http import Server, field_of
from r3.rollout.wire import Decoded, decode_lightllm
from r3.types import Finish

_FINISHES: dict[str, Finish] = {"stop": "stop", "length": "length", "aborted": "abort", "abort": "abort"}


class LightllmHttpEngine(GenerationOnlyEngine):
    """Adapter of LightLLM servers that run with `--enable_return_routed_experts`.

    There is no request option for later rows alone: `Request.routing_start` is cut here.
    """

    kind = "lightllm_http"

    def _meet(self, server: Server) -> str:
        """LightLLM does not tell its release or options; that it is alive is all that can be asked."""
        server.order("/health", "GET")
        return "lightllm"

    def _ask(self, server: Server, number: int, request: Request, sampling: Sampling, capture: bool) -> Answer:
        body = {"inputs": request.tokens.tolist(), "parameters": _parameters(sampling, capture)}
        answer = server.post("/generate", body)
        where = f"request {number}: {server.url}"
        tokens = field_of(answer, "tokens", where)
        reason = field_of(answer, "finish_reason", where)
        if not isinstance(tokens, list) or not all(isinstance(token, dict) for token in tokens):
            raise EngineError(f"{where} returned several answers to one request (n=1 was asked for)")
        if not isinstance(reason, str) or reason not in _FINISHES:
            raise EngineError(f"{where} ended with finish reason {reason!r}")
        if answer.get("prompt_tokens") != len(request.tokens):
            raise EngineError(
                f"{where} counts {answer.get('prompt_tokens')} prompt tokens, {len(request.tokens)} were sent; it must "
                "take token ids as they are"
            )
        return Answer(
            response=numbers([token.get("id") for token in tokens], np.int32, f"{where}: token ids"),
            logprobs=numbers([token.get("logprob") for token in tokens], np.float32, f"{where}: log-probs"),
            finish=_FINISHES[reason],
            cached_tokens=0,  # LightLLM does not say
            payload=answer.get("routed_experts"),
        )

    def _decoder(self, start: int) -> Callable[..., Decoded]:
        return partial(decode_lightllm, start=start)


def _parameters(sampling: Sampling, capture: bool) -> dict[str, object]:
    return {
        "do_sample": not sampling.greedy,
        "temperature": 1.0 if sampling.greedy else sampling.temperature,
        "max_new_tokens": sampling.max_new_tokens,
        "stop_sequences": [[token] for token in sampling.stop_token_ids],
        "ignore_eos": sampling.ignore_eos,
        "n": 1,
        "best_of": 1,
        "top_p": 1.0,
        "top_k": -1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "return_details": True,
        "return_routed_experts": capture,
    }
