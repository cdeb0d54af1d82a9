"""Payloads of engines, decoded into `RoutingTrace`: the one place where wide, unchecked routing exists.

numpy only, no engine import, so that every malformed payload can be tested.
"""

from __future__ import annotations

import binascii

import numpy as np
from numpy.typing import NDArray

from r3.errors import MissingRoutingError, RoutingError
from r3.routing import RoutingTrace, TokenIds
from r3.types import ModelSpec, WeightVersion

CAPTURE_IS_OFF = (
    "no routing came back although it was asked for: capture is off at the engine (enable_return_routed_experts), "
    "or something between drops meta_info.routed_experts"
)


def decode_sglang(
    payload: str | bytes | None,
    tokens: TokenIds,
    model: ModelSpec,
    *,
    request: int | str,
    weight_version: WeightVersion,
    engine: str,
) -> RoutingTrace:
    """Decode `meta_info.routed_experts` of SGLang for a sequence of tokens `[S]`, prompt and response.

    The payload is base64 of a flat, C-order little-endian int32 buffer with neither shape nor dtype, logically
    `[S-1, num_hidden_layers, top_k]` (SGLang PR #12162); dense layers read 0 and are dropped once that is checked.
    Raises `RoutingError` that names request, row, layer and value, `MissingRoutingError` where nothing came.
    """
    if payload is None:
        raise MissingRoutingError(f"request {request}: {CAPTURE_IS_OFF}")
    wide = _shaped(_from_base64(payload, request), len(tokens), model, request)
    _check_range(wide, model, request)
    _check_dense(wide, model, request)
    moe = wide if len(model.moe_layers) == model.num_layers else wide[:, list(model.moe_layers)]
    try:
        return RoutingTrace.record(
            moe,
            tokens,
            layers=model.moe_layers,
            num_experts=model.num_experts,
            weight_version=weight_version,
            engine=engine,
        )
    except RoutingError as error:
        raise RoutingError(f"request {request}: {error}") from error


def _from_base64(payload: str | bytes, request: int | str) -> bytes:
    try:
        return binascii.a2b_base64(payload, strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise RoutingError(f"request {request}: routing is not base64 ({error}); truncated in transport?") from error


def _shaped(raw: bytes, num_tokens: int, model: ModelSpec, request: int | str) -> NDArray[np.int32]:
    """View the buffer as `[rows, num_hidden_layers, top_k]`; the row count must follow from the tokens."""
    row = 4 * model.num_layers * model.top_k
    rows, rest = divmod(len(raw), row)
    if rest or rows != num_tokens - 1:
        raise RoutingError(
            f"request {request}: routing has {len(raw)} bytes = {len(raw) / row:g} rows of {model.num_layers} layers x "
            f"top-{model.top_k} int32; {num_tokens} tokens need {num_tokens - 1} rows"
        )
    return np.frombuffer(raw, dtype="<i4").reshape(rows, model.num_layers, model.top_k)


def _check_range(wide: NDArray[np.int32], model: ModelSpec, request: int | str) -> None:
    """Look at the wide ids: -1 and 256 are valid uint8 values once they are narrow."""
    if not wide.size or (int(wide.min()) >= 0 and int(wide.max()) < model.num_experts):
        return
    row, layer, slot = (int(i) for i in np.argwhere((wide < 0) | (wide >= model.num_experts))[0])
    raise RoutingError(
        f"request {request}: expert id {int(wide[row, layer, slot])} at row {row}, layer {layer}, slot {slot} is "
        f"outside [0, {model.num_experts}); the engine returned physical ids, padding or another model's routing"
    )


def _check_dense(wide: NDArray[np.int32], model: ModelSpec, request: int | str) -> None:
    """A dense layer has no router; a value there means that columns are not layers in the order of the checkpoint."""
    dense = [layer for layer in range(model.num_layers) if layer not in set(model.moe_layers)]
    if not dense or not wide[:, dense].any():
        return
    row, column, slot = (int(i) for i in np.argwhere(wide[:, dense])[0])
    layer = dense[column]
    raise RoutingError(
        f"request {request}: row {row}, layer {layer} holds expert {int(wide[row, layer, slot])}, but layer {layer} is "
        "dense; the engine's layer order is not the checkpoint's"
    )
