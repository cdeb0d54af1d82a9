"""SGLang's `meta_info.routed_experts`: base64 of a flat buffer without shape or dtype."""

from __future__ import annotations

import numpy as np

from r3.errors import MissingRoutingError, RoutingError
from r3.rollout.wire.common import (
    Decoded,
    WideIds,
    check_range,
    check_start,
    drop_dense,
    from_base64,
    record,
)
from r3.routing import RowsSeen, TokenIds, expert_dtype
from r3.types import ModelSpec, WeightVersion

CAPTURE_IS_OFF = (
    "no routing came back although it was asked for: capture is off at the engine (enable_return_routed_experts), "
    "or something between drops meta_info.routed_experts"
)
STOCK_DTYPE = "int32"


def decode_sglang(
    payload: str | bytes | None,
    tokens: TokenIds,
    model: ModelSpec,
    *,
    request: int | str,
    weight_version: WeightVersion,
    engine: str,
    start: int = 0,
    dtype: str | None = None,
) -> Decoded:
    """Decode `meta_info.routed_experts` of SGLang for a sequence of tokens `[S]`, prompt and response.

    The payload is base64 of a flat, C-order little-endian buffer with neither shape nor dtype, logically
    `[S-1-start, num_hidden_layers, top_k]` (SGLang PR #12162, `start` by PR #24851); dense layers read 0 and are
    dropped once that is checked. A stock server sends int32; ids in the record's own dtype (a server with our plugin)
    are told apart by the size. A server that ignored `start` sends `S-1` rows, of which those before `start` are cut.
    `dtype`: what this server is known to send. Raises `RoutingError` that names request, row, layer and value.
    """
    check_start(start, len(tokens), request)
    if payload is None:
        raise MissingRoutingError(f"request {request}: {CAPTURE_IS_OFF}")
    wide, begin = _shaped(from_base64(payload, request), len(tokens), model, request, start, dtype)
    check_range(wide, model, range(model.num_layers), request)
    moe = drop_dense(wide, model, request)
    return record(
        moe, tokens, model, begin=begin, start=start, request=request, weight_version=weight_version, engine=engine
    )


def read_rows(
    wide: WideIds,
    tokens: TokenIds,
    model: ModelSpec,
    *,
    request: int | str,
    weight_version: WeightVersion,
    engine: str,
    begin: int,
    start: int,
    seen: RowsSeen | None = None,
) -> Decoded:
    """Check rows `[rows, num_hidden_layers, top_k]` of positions from `begin` on that came through shared memory.

    Rows that need no cut are not copied. `seen`: of rows of a model without dense layers, as
    `RoutingTrace.record` takes it. Raises `RoutingError` as `decode_sglang` does.
    """
    check_start(start, len(tokens), request)
    last = max(len(tokens) - 1, 0)
    if begin not in (0, start) or len(wide) != last - begin:
        raise RoutingError(
            f"request {request}: {len(wide)} rows from position {begin} came back; {len(tokens)} tokens need "
            f"{last - start} from {start}"
        )
    if seen is None:
        check_range(wide, model, range(model.num_layers), request)
    moe = drop_dense(wide, model, request)
    return record(
        moe, tokens, model,
        begin=begin, start=start, request=request, weight_version=weight_version, engine=engine, shared=True,
        seen=seen,
    )  # fmt: skip


def _shaped(
    raw: bytes, num_tokens: int, model: ModelSpec, request: int | str, start: int, dtype: str | None
) -> tuple[WideIds, int]:
    """View the buffer as `[rows, num_hidden_layers, top_k]` and return it with the position of its first row.

    Row count and width must follow from the tokens; with two readings that fit, `dtype` decides or nothing does.
    """
    last = max(num_tokens - 1, 0)
    per_row = model.num_layers * model.top_k
    names = dict.fromkeys([STOCK_DTYPE, expert_dtype(model.num_experts).name] if dtype is None else [dtype])
    widths = {name: np.dtype(name).itemsize for name in names}
    fits = [
        (name, begin)
        for begin in dict.fromkeys((start, 0))
        for name, width in widths.items()
        if len(raw) == (last - begin) * per_row * width
    ]
    if not raw and fits:
        fits = fits[:1]  # no rows have no width
    if len(fits) == 1:
        name, begin = fits[0]
        wide = np.frombuffer(raw, dtype=np.dtype(name).newbyteorder("<"))
        return wide.reshape(last - begin, model.num_layers, model.top_k), begin
    width = widths.get(STOCK_DTYPE, min(widths.values()))
    size = (
        f"request {request}: routing has {len(raw)} bytes = {len(raw) / (per_row * width):g} rows of "
        f"{model.num_layers} layers x top-{model.top_k} {STOCK_DTYPE if STOCK_DTYPE in widths else dtype}"
    )
    if fits:
        raise RoutingError(f"{size}, which fits {' and '.join(f'{n} from row {b}' for n, b in fits)}; name its dtype")
    wanted = f"{last - start} rows" + (f" (or {last} from a server without routed_experts_start_len)" if start else "")
    raise RoutingError(f"{size}; {num_tokens} tokens need {wanted}")
