"""What every decoder does: base64, ids in range on the wide array, dense columns, and the record itself."""

from __future__ import annotations

import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pybase64
from numpy.typing import NDArray

from r3.errors import RoutingError
from r3.routing import RoutingTrace, RowsSeen, TokenIds, is_outside
from r3.types import ModelSpec, WeightVersion

WideIds = NDArray[np.integer[Any]]


class Wire(NamedTuple):
    """How a record came over the wire: numpy dtype name of its ids, and the token position of its first row.

    `begin` is 0 for a server that ignored `Request.routing_start`, whatever was asked. `shared`: it came through shared
    memory.
    """

    dtype: str
    begin: int
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Decoded:
    """A checked record, and what was seen of the wire."""

    routing: RoutingTrace
    wire: Wire


def from_base64(payload: str | bytes, request: int | str) -> bytes:
    """Return the bytes behind strict base64; raise `RoutingError` for anything else, also for re-padded text."""
    try:
        # The standard library takes many times longer (docs/benchmarks.md).
        raw = pybase64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise RoutingError(f"request {request}: routing is not base64 ({error}); truncated in transport?") from error
    if len(payload) != 4 * -(-len(raw) // 3):  # whole quads of padding may pass
        raise RoutingError(f"request {request}: routing is not base64 (padded again); changed in transport?")
    return raw


def check_start(start: int, num_tokens: int, request: int | str) -> None:
    """Raise `RoutingError` unless rows from `start` on can exist in a sequence of `num_tokens`."""
    if not 0 <= start <= max(num_tokens - 1, 0):
        raise RoutingError(f"request {request}: routing_start is {start}; 0 to {max(num_tokens - 1, 0)} are possible")


def check_width(dtype: np.dtype[Any], num_experts: int, request: int | str) -> None:
    """Raise `RoutingError` for ids that cannot all be told apart in `dtype`, such as int8 with 200 experts."""
    if np.iinfo(dtype).max < num_experts - 1:
        raise RoutingError(
            f"request {request}: routing is {dtype}, which cannot hold expert ids up to {num_experts - 1}; "
            "higher ids have wrapped around, use an engine release that sends wider ids"
        )


def check_range(wide: WideIds, model: ModelSpec, layers: Sequence[int], request: int | str) -> None:
    """Look at ids `[rows, layers, k]` while they are wide: -1 and 256 are valid uint8 values once they are narrow.

    `layers`: global index of each column. Raises `RoutingError` that names the first id out of range.
    """
    if not is_outside(wide, model.num_experts):
        return
    row, column, slot = (int(i) for i in np.argwhere((wide < 0) | (wide >= model.num_experts))[0])
    raise RoutingError(
        f"request {request}: expert id {int(wide[row, column, slot])} at row {row}, layer {layers[column]}, slot {slot}"
        f" is outside [0, {model.num_experts}); the engine returned physical ids, padding or another model's routing"
    )


def drop_dense(wide: WideIds, model: ModelSpec, request: int | str) -> WideIds:
    """Return the MoE columns of `[rows, num_hidden_layers, k]`, once every dense column is known to be 0.

    A dense layer has no router; a value there means that columns are not layers in the order of the checkpoint.
    Raises `RoutingError`.
    """
    moe = set(model.moe_layers)
    dense = [layer for layer in range(model.num_layers) if layer not in moe]
    if not dense:
        return wide
    if wide[:, dense].any():
        row, column, slot = (int(i) for i in np.argwhere(wide[:, dense])[0])
        layer = dense[column]
        raise RoutingError(
            f"request {request}: row {row}, layer {layer} holds expert {int(wide[row, layer, slot])}, but layer "
            f"{layer} is dense; the engine's layer order is not the checkpoint's"
        )
    return wide[:, list(model.moe_layers)]


def record(
    moe: WideIds,
    tokens: TokenIds,
    model: ModelSpec,
    *,
    begin: int,
    start: int,
    request: int | str,
    weight_version: WeightVersion,
    engine: str,
    shared: bool = False,
    seen: RowsSeen | None = None,
) -> Decoded:
    """Freeze rows `[rows, moe_layers, k]` of positions from `begin` on, and cut those before `start`.

    `seen`: as `RoutingTrace.record` takes it. Raises `RoutingError` with the name of the request.
    """
    try:
        trace = RoutingTrace.record(
            moe,
            tokens,
            layers=model.moe_layers,
            num_experts=model.num_experts,
            weight_version=weight_version,
            engine=engine,
            begin=begin,
            seen=seen,
        )
    except RoutingError as error:
        raise RoutingError(f"request {request}: {error}") from error
    if begin < start:
        trace = trace.clip(start, len(tokens), tokens)
    return Decoded(trace, Wire(moe.dtype.name, begin, shared))
