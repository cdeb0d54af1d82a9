"""LightLLM's `routed_experts`: `{"shape", "dtype", "data"}`, of which three incompatible layouts exist."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from r3.errors import MissingRoutingError, RoutingError
from r3.rollout.wire.common import Decoded, check_range, check_start, check_width, from_base64, record
from r3.routing import TokenIds
from r3.types import ModelSpec, WeightVersion

Layout = Literal["token-major", "layer-major"]
CAPTURE_IS_OFF = (
    "no routing came back although it was asked for: start LightLLM with --enable_return_routed_experts, and look "
    "whether something between drops routed_experts"
)


def decode_lightllm(
    payload: object,
    tokens: TokenIds,
    model: ModelSpec,
    *,
    request: int | str,
    weight_version: WeightVersion,
    engine: str,
    start: int = 0,
) -> Decoded:
    """Decode the top-level `routed_experts` of a LightLLM answer for a sequence of tokens `[S]`.

    MoE layers only, `S-1` rows, base64 of a C-order little-endian buffer. Layouts, by release: `[layers, rows, k]` int8
    up to 127 experts, else int16 (PRs #1190, #1212); the same as "int32" (docs/r3_routing_capture.md);
    `[rows, layers, k]` uint8 up to 256 experts, else int16 (moe_route_info_manager.py). Dtype and shape must name one
    of them and no other. There is no way to ask for later rows alone, so those before `start` are cut here.
    Raises `RoutingError` that names request and value.
    """
    check_start(start, len(tokens), request)
    if payload is None:
        raise MissingRoutingError(f"request {request}: {CAPTURE_IS_OFF}")
    shape, dtype, data = _fields(payload, request)
    if dtype not in ("int8", "uint8", "int16", "int32"):
        raise RoutingError(f"request {request}: routing dtype is {dtype!r}; LightLLM sends uint8, int8, int16 or int32")
    kind = np.dtype(dtype)
    check_width(kind, model.num_experts, request)
    layout = _layout(shape, dtype, max(len(tokens) - 1, 0), model, request)
    raw = from_base64(data, request)
    # The shape is known by now, so nothing is made from a number that the server chose.
    if len(raw) != shape[0] * shape[1] * shape[2] * kind.itemsize:
        raise RoutingError(
            f"request {request}: routing has {len(raw)} bytes, its shape {shape} of {dtype} needs others"
        )
    wide = np.frombuffer(raw, dtype=kind.newbyteorder("<")).reshape(shape)
    if layout == "layer-major":
        wide = wide.transpose(1, 0, 2)
    check_range(wide, model, model.moe_layers, request)
    return record(
        wide, tokens, model, begin=0, start=start, request=request, weight_version=weight_version, engine=engine
    )


def _fields(payload: object, request: int | str) -> tuple[tuple[int, int, int], str, str]:
    if not isinstance(payload, Mapping):
        raise RoutingError(f"request {request}: routing is a {type(payload).__name__}; an object is required")
    shape, dtype, data = (payload.get(key) for key in ("shape", "dtype", "data"))
    if not isinstance(dtype, str) or not isinstance(data, str):
        raise RoutingError(f"request {request}: routing lacks the texts dtype and data; it has {list(payload)[:8]}")
    if not isinstance(shape, list) or len(shape) != 3 or not all(type(size) is int for size in shape):
        raise RoutingError(f"request {request}: routing shape is {str(shape)[:80]}; three sizes are required")
    return (shape[0], shape[1], shape[2]), dtype, data


def _layout(shape: tuple[int, int, int], dtype: str, rows: int, model: ModelSpec, request: int | str) -> Layout:
    """Return the one layout that dtype and shape allow; raise `RoutingError` for none and for two."""
    layers = len(model.moe_layers)
    both: dict[Layout, tuple[int, int, int]] = {
        "token-major": (rows, layers, model.top_k),
        "layer-major": (layers, rows, model.top_k),
    }
    if dtype == "uint8":
        del both["layer-major"]
    elif dtype != "int16" or model.num_experts <= 256:
        del both["token-major"]
    fits: list[Layout] = [layout for layout, expected in both.items() if shape == expected]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise RoutingError(
            f"request {request}: routing of shape {list(shape)} {dtype} can be token-major or layer-major; one token "
            "more, or fewer, can be told apart"
        )
    wanted = " or ".join(f"{list(expected)} ({layout})" for layout, expected in both.items())
    raise RoutingError(
        f"request {request}: routing has shape {list(shape)} {dtype}; {rows + 1} tokens, {layers} MoE layers and "
        f"top-{model.top_k} need {wanted}"
    )
