"""The routing record: which experts every token of one sequence was sent to.

numpy only. The record is made in the rollout process (`r3.rollout.wire`), travels through the object store unchanged
and is verified again where the trainer installs it (`r3.trainer.batching`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from r3.crc import crc32
from r3.errors import RoutingError
from r3.structure import ExpertIds as ExpertIds
from r3.structure import check_constant_layers as check_constant_layers
from r3.structure import check_live, has_repeats, repeated_ids, repeated_rows

Provenance = Literal["exact", "unknown"]
TokenIds = NDArray[np.int32]
_TOKENS = np.dtype("<i4")


class Span(NamedTuple):
    """Rows of token positions `[begin, end)`, all written under one weight version."""

    begin: int
    end: int
    weight_version: int


def expert_dtype(num_experts: int) -> np.dtype[np.unsignedinteger]:
    """Return the id dtype of a model with `num_experts` experts: uint8 up to 256, uint16 up to 65,536.

    The rule looks at the model, never at the ids of a batch, so a record never changes its width; no value is
    reserved, because a 256-expert model uses all 256. Raises `RoutingError` outside that range.
    """
    if not 1 <= num_experts <= 65_536:
        raise RoutingError(f"num_experts is {num_experts}; a routing record holds between 1 and 65,536 experts")
    return np.dtype(np.uint8) if num_experts <= 256 else np.dtype(np.uint16)


def narrow(wide: NDArray[np.integer], num_experts: int) -> ExpertIds:
    """Range-check ids of any integer dtype and return them in the model's dtype, C-contiguous.

    The check comes before the cast, because numpy turns -1 into 255 and 256 into 0 without a word.
    Raises `RoutingError` that names the first id outside `[0, num_experts)`.
    """
    if wide.dtype.kind not in "iu":
        raise RoutingError(f"expert ids have dtype {wide.dtype}; integers are required")
    if is_outside(wide, num_experts):
        at = np.unravel_index(int(np.argmax((wide < 0) | (wide >= num_experts))), wide.shape)
        raise RoutingError(
            f"expert id {int(wide[at])} at [row, layer, slot] {tuple(map(int, at))} is outside [0, {num_experts}); "
            "the engine returned physical ids, padding or another model's routing"
        )
    return np.ascontiguousarray(wide, dtype=expert_dtype(num_experts))


def is_outside(wide: NDArray[np.integer], num_experts: int) -> bool:
    """Tell whether an id of any integer dtype is outside `[0, num_experts)`, in one pass where that is enough."""
    if not wide.size:
        return False
    can_exceed = num_experts <= np.iinfo(wide.dtype).max
    if wide.dtype.kind == "u":
        return can_exceed and int(wide.max()) >= num_experts
    if can_exceed:
        # Read as unsigned, a negative id is larger than every legal one.
        return int(wide.view(wide.dtype.str.replace("i", "u")).max()) >= num_experts
    return int(wide.min()) < 0 or int(wide.max()) >= num_experts


def checksum(experts: ExpertIds, tokens: TokenIds) -> int:
    """Return one crc32 over routing rows and the token ids that they belong to."""
    return _with_tokens(rows_checksum(experts), tokens)


def _with_tokens(rows_crc32: int, tokens: TokenIds) -> int:
    return crc32(np.ascontiguousarray(tokens, dtype=_TOKENS), rows_crc32)


def rows_checksum(experts: ExpertIds) -> int:
    """Return the crc32 of routing rows alone, little-endian: what `checksum` begins with."""
    return crc32(np.ascontiguousarray(experts, dtype=_little(experts.dtype)))


@lru_cache
def _little(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return dtype.newbyteorder("<")


class RowsSeen(NamedTuple):
    """What is known of rows whose ids are in range and distinct, whatever their tokens are.

    `crc32`: of the rows alone; `same` bool `[rows - 1]`: which equal the next one in every layer.
    """

    crc32: int
    same: NDArray[np.bool_]


def see_rows(experts: ExpertIds, num_experts: int) -> RowsSeen | None:
    """Look at rows `[rows, layers, k]` of a record's own dtype; None where an id is out of range or named twice."""
    if is_outside(experts, num_experts) or has_repeats(experts):
        return None
    return RowsSeen(rows_checksum(experts), repeated_rows(experts))


@dataclass(frozen=True, slots=True)
class RoutingTrace:
    """Experts that one token sequence was routed to, in every MoE layer.

    `experts`: `[rows, layers, k]`, C-contiguous and read-only, uint8 for at most 256 experts, else uint16; logical ids
    of routed experts (never shared ones). Row t is the routing used when token t was the *input* of a forward pass, the
    one behind the logits of token t+1, so a full trace of S tokens has S-1 rows, prompt rows included.
    `layers`: global index of each MoE layer in column order; dense layers are absent.
    `spans`: sorted, disjoint token ranges; `experts` is their concatenation, so a gap has no row and needs no sentinel.
    `crc32`: over rows and the tokens that they belong to, see `checksum`.
    """

    experts: ExpertIds
    layers: tuple[int, ...]
    num_experts: int
    spans: tuple[Span, ...]
    engine: str
    provenance: Provenance
    crc32: int

    @classmethod
    def record(
        cls,
        wide: NDArray[np.integer],
        tokens: TokenIds,
        *,
        layers: Sequence[int],
        num_experts: int,
        weight_version: int,
        engine: str,
        provenance: Provenance = "unknown",
        begin: int = 0,
        seen: RowsSeen | None = None,
    ) -> RoutingTrace:
        """Check rows `[rows, layers, k]` of any integer dtype against the tokens `[S]` and freeze them as a record.

        Rows cover token positions `[begin, begin + rows)` under one weight version. `seen`: what `see_rows` said of
        rows in the record's own dtype. Raises `RoutingError`.
        """
        if wide.ndim != 3 or wide.shape[1] != len(layers):
            raise RoutingError(f"routing has shape {wide.shape}; [rows, {len(layers)} MoE layers, k] is required")
        experts = narrow(wide, num_experts) if seen is None else np.ascontiguousarray(wide)
        experts.flags.writeable = False
        end = begin + experts.shape[0]
        trace = cls(
            experts=experts,
            layers=tuple(int(layer) for layer in layers),
            num_experts=num_experts,
            spans=(Span(begin, end, weight_version),) if end > begin else (),
            engine=engine,
            provenance=provenance,
            crc32=_with_tokens(rows_checksum(experts) if seen is None else seen.crc32, tokens),
        )
        # `narrow` has looked at the range.
        trace.validate_form(len(tokens))
        if seen is None:
            check_distinct(experts, trace.layers)
        trace.check_live(tokens, None if seen is None else seen.same)
        return trace

    @property
    def rows(self) -> int:
        """Number of recorded rows."""
        return int(self.experts.shape[0])

    @property
    def top_k(self) -> int:
        """Routed experts per token and layer."""
        return int(self.experts.shape[2])

    def positions(self) -> NDArray[np.int64]:
        """Return the absolute token position of every row, `[rows]` int64."""
        return positions(self.spans)

    def validate(self, num_tokens: int) -> None:
        """Check everything that can be checked without another forward pass; raise `RoutingError` that names the row.

        Shape, dtype by the model's expert count, spans against rows and tokens, id range, distinct ids in each row
        (which also finds rows that were never written: all zeros).
        """
        validate_rows(self.experts, self.layers, self.num_experts)
        check_spans(self.spans, self.rows, num_tokens)

    def validate_form(self, num_tokens: int) -> None:
        """Check what it takes to place the rows, `validate` without a look at the ids; raise `RoutingError`."""
        check_shape(self.experts, self.layers, self.num_experts)
        check_spans(self.spans, self.rows, num_tokens)

    def check_live(self, tokens: TokenIds, same: NDArray[np.bool_] | None = None) -> None:
        """Raise `RoutingError` where rows do not react to the tokens `[S]`; see `r3.structure.check_live`."""
        check_live(self.experts, self.layers, self.num_experts, tokens[self.positions()], same)

    def to_bytes(self, tokens: TokenIds | None = None) -> bytes:
        """Return the record in its wire form (`docs/record.md`), with `tokens` `[S]` when given; raise `RoutingError`.

        A record that is wrong is not written.
        """
        from r3.record import encode  # the codec builds on this module

        return encode(self, tokens)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> RoutingTrace:
        """Read the one record that `data` holds in wire form; its rows are a view of `data`. Raises `RoutingError`."""
        from r3.record import decode

        return decode(data).trace

    def verify(self, tokens: TokenIds) -> None:
        """Raise `RoutingError` unless rows and `tokens` `[S]` are the ones that the record was made from."""
        found = checksum(self.experts, tokens)
        if found != self.crc32:
            raise RoutingError(
                f"routing checksum is {found:#010x}, recorded {self.crc32:#010x}: rows and tokens do not belong "
                "together (changed in transport, or routes of another sequence)"
            )

    def clip(self, begin: int, end: int, tokens: TokenIds) -> RoutingTrace:
        """Return the rows of positions `[begin, end)`; `tokens` `[S]` are the sequence's ids, for the checksum."""
        where = self.positions()
        keep = (where >= begin) & (where < end)
        experts = np.ascontiguousarray(self.experts[keep])
        experts.flags.writeable = False
        spans = tuple(
            Span(max(span.begin, begin), min(span.end, end), span.weight_version)
            for span in self.spans
            if max(span.begin, begin) < min(span.end, end)
        )
        return replace(self, experts=experts, spans=spans, crc32=checksum(experts, tokens))

    def concatenate(self, later: RoutingTrace, tokens: TokenIds) -> RoutingTrace:
        """Return this record followed by `later`, which lies behind it; `tokens` `[S]` are the joined sequence.

        Adjacent spans of one weight version are merged. Raises `RoutingError` where model or positions do not fit.
        """
        if (self.layers, self.num_experts, self.top_k) != (later.layers, later.num_experts, later.top_k):
            raise RoutingError("records of different models cannot be joined (layers, experts or top-k differ)")
        if self.spans and later.spans and later.spans[0].begin < self.spans[-1].end:
            raise RoutingError(f"rows from position {later.spans[0].begin} overlap those up to {self.spans[-1].end}")
        experts = np.concatenate([self.experts, later.experts])
        experts.flags.writeable = False
        return replace(
            self,
            experts=experts,
            spans=merge_spans((*self.spans, *later.spans)),
            provenance="exact" if self.provenance == later.provenance == "exact" else "unknown",
            crc32=checksum(experts, tokens),
        )


def validate_rows(experts: ExpertIds, layers: Sequence[int], num_experts: int) -> None:
    """Raise `RoutingError` unless `experts` `[rows, layers, k]` is what a model with these layers can have produced."""
    check_shape(experts, layers, num_experts)
    check_range(experts, num_experts)
    check_distinct(experts, layers)


def check_shape(experts: ExpertIds, layers: Sequence[int], num_experts: int) -> None:
    """Raise `RoutingError` unless `experts` is `[rows, layers, k]` in the dtype of a model with these layers."""
    if experts.ndim != 3 or experts.shape[1] != len(layers):
        raise RoutingError(f"routing has shape {experts.shape}; [rows, {len(layers)} MoE layers, k] is required")
    _check_kind(experts.dtype, tuple(layers), experts.shape[2], num_experts)


# The records of a step are of one kind.
@lru_cache
def _check_kind(dtype: np.dtype[Any], layers: tuple[int, ...], top_k: int, num_experts: int) -> None:
    if dtype != expert_dtype(num_experts):
        raise RoutingError(f"routing is {dtype}; {num_experts} experts need {expert_dtype(num_experts)}")
    if not layers or layers[0] < 0 or layers != tuple(sorted(set(layers))):
        raise RoutingError(f"MoE layers {layers} are not the strictly ascending indices of at least one layer")
    if not 1 <= top_k <= num_experts:
        raise RoutingError(f"top-k is {top_k} of {num_experts} experts; it lies between 1 and their number")


def check_range(experts: ExpertIds, num_experts: int) -> None:
    """Raise `RoutingError` for an id that the model does not have."""
    if is_outside(experts, num_experts):
        raise RoutingError(f"expert id {int(experts.max())} is outside [0, {num_experts})")


def check_distinct(experts: ExpertIds, layers: Sequence[int]) -> None:
    """Raise `RoutingError` where a row of `experts` `[rows, layers, k]` names an expert twice in one layer."""
    if has_repeats(experts):
        repeated = repeated_ids(experts)
        row, layer = (int(i) for i in np.argwhere(repeated)[0])
        ids = experts[row, layer].tolist()
        never = " (never written by the engine)" if not any(ids) else ""
        raise RoutingError(
            f"row {row}, layer {layers[layer]} repeats an expert: {ids}{never}; "
            f"{int(repeated.sum())} of {repeated.size} (row, layer) pairs are affected"
        )


def check_spans(spans: Sequence[Span], rows: int, num_tokens: int) -> None:
    """Raise `RoutingError` unless spans are sorted, disjoint, add up to `rows` and end before the last token."""
    previous = found = 0
    for begin, end, version in spans:
        if not previous <= begin < end:
            raise RoutingError(f"span {(begin, end, version)} is empty, unsorted or overlaps the one before it")
        previous, found = end, found + end - begin
    if found != rows:
        raise RoutingError(f"spans {[tuple(span) for span in spans]} do not add up to the {rows} recorded rows")
    if previous > max(num_tokens - 1, 0):
        raise RoutingError(
            f"rows reach position {previous} of {num_tokens} tokens; the last token was never an input, "
            f"so at most {max(num_tokens - 1, 0)} rows can exist"
        )


def positions(spans: Sequence[Span]) -> NDArray[np.int64]:
    """Return the absolute token position of every row of `spans`, `[rows]` int64."""
    return np.concatenate([np.empty(0, np.int64), *(np.arange(s.begin, s.end, dtype=np.int64) for s in spans)])


def merge_spans(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Join neighbours that touch and share a weight version."""
    merged: list[Span] = []
    for span in spans:
        last = merged[-1] if merged else None
        if last and last.end == span.begin and last.weight_version == span.weight_version:
            merged[-1] = Span(last.begin, span.end, span.weight_version)
        else:
            merged.append(span)
    return tuple(merged)
