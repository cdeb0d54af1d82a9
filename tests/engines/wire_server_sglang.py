"""Speaks SGLang's HTTP forms where the real server cannot be made to misbehave; there is no model behind it."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from r3.types import ModelSpec
from tests.engines.wire_server import Body, Reply, made_up_experts


@dataclass
class SglangWire:
    """Answers every prompt with the tokens 5, 6, ... under `version`, and experts of `made_up_experts`.

    `change(answer, body)` edits an answer; `info` and `model_info` are laid over what the server tells of itself;
    `failures` replies come before anything else; `refused_flushes` counts down.
    """

    model: ModelSpec
    model_path: str
    version: str = "0"
    honours_start: bool = True
    info: dict[str, Any] = field(default_factory=dict)
    model_info: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Body, Body], None] = lambda answer, body: None
    failures: list[Reply] = field(default_factory=list)
    refused_flushes: int = 0
    loads: bool = True

    def __call__(self, method: str, path: str, body: Body) -> Reply:
        if self.failures:
            return self.failures.pop(0)
        if path == "/server_info":
            told = {"version": "0.5.23", "enable_return_routed_experts": True, "dtype": "float32"}
            return 200, told | {"skip_tokenizer_init": True} | self.info
        if path == "/model_info":
            told = {"model_path": self.model_path, "weight_version": self.version, "model_type": "qwen3_moe"}
            return 200, told | self.model_info
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return 200, {"success": True}
        if path == "/update_weights_from_disk":
            if self.loads:
                self.version = body["weight_version"]
            return (200 if self.loads else 400), {"success": self.loads, "message": "Failed to get weights iterator"}
        if path == "/flush_cache":
            self.refused_flushes -= 1
            return (200, b"Cache flushed.") if self.refused_flushes < 0 else (400, b"pending requests")
        if path == "/generate":
            return 200, self.generate(body)
        return 404, {"detail": "Not Found"}

    def generate(self, body: Body) -> Body:
        """One answer."""
        prompt = body["input_ids"]
        response = [5 + i for i in range(body["sampling_params"]["max_new_tokens"])]
        answer: Body = {
            "output_ids": response,
            "meta_info": {
                "output_token_logprobs": [[-0.5, token, None] for token in response],
                "finish_reason": {"type": "length"},
                "weight_version": self.version,
                "cached_tokens": 0,
            },
        }
        if body.get("return_routed_experts"):
            start = body.get("routed_experts_start_len", 0) if self.honours_start else 0
            experts = made_up_experts(np.array(prompt + response), range(self.model.num_layers), self.model)
            answer["meta_info"]["routed_experts"] = encode(experts[start:])
        self.change(answer, body)
        return answer


def encode(experts: np.ndarray, dtype: Any = np.int32) -> str:
    """`[rows, num_hidden_layers, k]` as SGLang sends it."""
    return base64.b64encode(experts.astype(dtype).tobytes()).decode()
