"""Speaks the wire format of vLLM's token endpoint (`/inference/v1/generate`); there is no model behind it."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from r3.types import ModelSpec
from tests.engines.wire_server import Body, Reply, made_up_experts


@dataclass
class VllmWire:
    """Answers every prompt with the tokens 5, 6, ... and experts of `made_up_experts`; dense layers read 0."""

    model: ModelSpec
    capture: bool = True
    honours_start: bool = True
    development: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)

    def __call__(self, method: str, path: str, body: Body) -> Reply:
        if path == "/version":
            return 200, {"version": "0.33.0"}
        if path.startswith("/server_info") and self.development:
            options = {
                "enable_return_routed_experts": self.capture,
                "logprobs_mode": "processed_logprobs",
            } | self.options
            return 200, {"vllm_config": {"model_config": options}}
        if (method, path) != ("POST", "/inference/v1/generate"):
            return 404, {"detail": "Not Found"}
        prompt, parameters = body["token_ids"], body["sampling_params"]
        response = [5 + i for i in range(parameters["max_tokens"])]
        choice = {
            "index": 0,
            "token_ids": response,
            "finish_reason": "length",
            "logprobs": {"content": [{"token": f"token_id:{token}", "logprob": -0.5} for token in response]},
            "routed_experts": None,
        }
        if self.capture:
            experts = made_up_experts(np.array(prompt + response), range(self.model.num_layers), self.model)
            dense = [i for i in range(self.model.num_layers) if i not in self.model.moe_layers]
            experts[:, dense] = 0
            start = parameters.get("routed_experts_prompt_start", 0) if self.honours_start else 0
            choice["routed_experts"] = encode(experts[start:], self.model)
        choices = self.changes.pop("choices", None) or [choice | self.changes]
        return 200, {"id": "generate-tokens-1", "model": "m", "choices": choices, "usage": {}}


def encode(experts: np.ndarray, model: ModelSpec) -> str:
    """`[rows, num_hidden_layers, k]` as base64 of a `.npy` file."""
    file = io.BytesIO()
    np.save(file, experts.astype(np.uint8 if model.num_experts <= 256 else np.uint16))
    return base64.b64encode(file.getvalue()).decode()
