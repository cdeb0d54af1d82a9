"""Speaks LightLLM's documented wire format (`/generate` with `return_routed_experts`); there is no model behind it."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from r3.types import ModelSpec
from tests.engines.wire_server import Body, Reply, made_up_experts

Layout = Literal["newest", "first", "documented"]


@dataclass
class LightllmWire:
    """Answers every prompt with the tokens 5, 6, ... and experts of `made_up_experts`, in one of the three layouts."""

    model: ModelSpec
    layout: Layout = "newest"
    capture: bool = True
    changes: dict[str, Any] = field(default_factory=dict)

    def __call__(self, method: str, path: str, body: Body) -> Reply:
        if path == "/health":
            return 200, {"message": "Ok"}
        if (method, path) != ("POST", "/generate"):
            return 404, {"detail": "Not Found"}
        prompt, parameters = body["inputs"], body["parameters"]
        response = [5 + i for i in range(parameters["max_new_tokens"])]
        answer = {
            "generated_text": [""],
            "count_output_tokens": len(response),
            "finish_reason": "length",
            "prompt_tokens": len(prompt),
            "tokens": [{"id": token, "logprob": -0.5, "special": False, "text": ""} for token in response],
        }
        if parameters["return_routed_experts"] and self.capture:
            experts = made_up_experts(np.array(prompt + response), self.model.moe_layers, self.model)
            answer["routed_experts"] = encode(experts, self.layout, self.model)
        return 200, {key: value for key, value in (answer | self.changes).items() if value is not None}


def encode(experts: np.ndarray, layout: Layout, model: ModelSpec) -> dict[str, Any]:
    """`[rows, layers, k]` as a release sends it."""
    if layout == "newest":
        wide = experts.astype(np.uint8 if model.num_experts <= 256 else np.int16)
    elif layout == "first":
        wide = experts.transpose(1, 0, 2).astype(np.int8 if model.num_experts <= 127 else np.int16)
    else:
        wide = experts.transpose(1, 0, 2).astype(np.int32)
    data = base64.b64encode(np.ascontiguousarray(wide).tobytes()).decode()
    return {"shape": list(wide.shape), "dtype": wide.dtype.name, "data": data}
