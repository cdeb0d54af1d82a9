"""vLLM's `routed_experts`: base64 of a `.npy` file, one per choice."""

from __future__ import annotations

import io
import tokenize
import warnings
from typing import Any

import numpy as np
from numpy.lib import format as npy

from r3.errors import MissingRoutingError, RoutingError
from r3.rollout.wire.common import Decoded, check_range, check_start, check_width, drop_dense, from_base64, record
from r3.routing import TokenIds
from r3.types import ModelSpec, WeightVersion

CAPTURE_IS_OFF = (
    "no routing came back although it was asked for: start vLLM with --enable-return-routed-experts, and look whether "
    "something between drops routed_experts"
)
DTYPES = ("uint8", "uint16", "int16", "int32")
_MAX_HEADER = 512  # bytes; numpy writes 128
_UNREADABLE = (ValueError, SyntaxError, TypeError, KeyError, OverflowError, RecursionError, MemoryError,
               tokenize.TokenError)  # fmt: skip


def decode_vllm(
    payload: str | bytes | None,
    tokens: TokenIds,
    model: ModelSpec,
    *,
    request: int | str,
    weight_version: WeightVersion,
    engine: str,
    start: int = 0,
) -> Decoded:
    """Decode `choices[i].routed_experts` of vLLM for a sequence of tokens `[S]`, prompt and response.

    A `.npy` array `[S-1-start, num_hidden_layers, top_k]`, uint8 up to 256 experts, else uint16 (vLLM 0.33,
    `entrypoints/serve/disagg/serving.py`); int16 and int32 of older releases are read by the same self-description.
    `start`: `routed_experts_prompt_start`; of the `S-1` rows of a server that ignored it those before are cut. Dense
    layers read 0 and are dropped once that is checked. Nothing is unpickled, the header makes nothing.
    Raises `RoutingError`.
    """
    check_start(start, len(tokens), request)
    if payload is None:
        raise MissingRoutingError(f"request {request}: {CAPTURE_IS_OFF}")
    raw = from_base64(payload, request)
    shape, dtype, offset = _header(raw, request)
    last = max(len(tokens) - 1, 0)
    begin = next((b for b in (start, 0) if shape == (last - b, model.num_layers, model.top_k)), None)
    if begin is None:
        raise RoutingError(
            f"request {request}: routing has shape {shape}; {len(tokens)} tokens, {model.num_layers} layers and "
            f"top-{model.top_k} need {(last - start, model.num_layers, model.top_k)}"
        )
    check_width(dtype, model.num_experts, request)
    if len(raw) - offset != (last - begin) * model.num_layers * model.top_k * dtype.itemsize:
        raise RoutingError(
            f"request {request}: routing has {len(raw) - offset} bytes behind its header, its shape {shape} of {dtype} "
            "needs others"
        )
    wide = np.frombuffer(raw, dtype=dtype, offset=offset).reshape(shape)
    check_range(wide, model, range(model.num_layers), request)
    moe = drop_dense(wide, model, request)
    return record(
        moe, tokens, model, begin=begin, start=start, request=request, weight_version=weight_version, engine=engine
    )


def _header(raw: bytes, request: int | str) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return shape, dtype and length of a `.npy` header of version 1.0, the one that numpy writes for plain arrays."""
    file = io.BytesIO(raw[: _MAX_HEADER + 16])
    try:
        version = npy.read_magic(file)
        if version != (1, 0):
            raise RoutingError(f"request {request}: routing is .npy version {version}; (1, 0) is required")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy warns of headers that Python 2 wrote, and reads them by other means
            shape, fortran, dtype = npy.read_array_header_1_0(file, max_header_size=_MAX_HEADER)
    except (*_UNREADABLE, UserWarning) as error:
        raise RoutingError(
            f"request {request}: routing is not a .npy file ({type(error).__name__}: {error})"
        ) from error
    if fortran or dtype.name not in DTYPES or not dtype.isnative:
        order = "Fortran" if fortran else "C"
        raise RoutingError(
            f"request {request}: routing is {dtype} in {order} order; {', '.join(DTYPES)} in C order are required"
        )
    return tuple(shape), dtype, file.tell()
