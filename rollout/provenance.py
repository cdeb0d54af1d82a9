"""Who wrote each routing row: stamps of an engine's forward passes -> exact spans and stale rows.

numpy only. `r3.rollout.sglang_plugin` makes the stamps inside SGLang's scheduler; this module is the form in which they
travel (`pack`, `unpack`), what follows from them (`stamped`) and what a run does about it (`settle`).

A forward pass has a number, ascending from 1 in the order of execution, and runs under one set of weights. Row t of a
record was written by some pass; the log-prob of a sampled token came out of another or the same one. They belong
together when the pass that wrote row t is the one behind the log-prob of token t+1, or, for prompt rows, which samples
may share, when it ran before the first sampled token's and under the same weights. Every other row is stale.
"""

from __future__ import annotations

import binascii
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from r3.errors import RoutingError
from r3.routing import RoutingTrace, Span, TokenIds, checksum

# The key of `meta_info` under which the stamps of a finished request come back.
KEY = "r3_provenance"
FORMAT = 1
# Version of rows that no forward pass of the engine has written since its stamps began.
UNWRITTEN = -1

Reason = Literal["version", "rewritten", "unwritten"]
OnStale = Literal["fail", "drop_sample", "native_rows"]
Forwards = NDArray[np.int32]


class Weights(NamedTuple):
    """The weights from forward pass `first` on: their label, and how many updates the engine had taken by then."""

    first: int
    label: str
    updates: int


@dataclass(frozen=True, slots=True)
class Stamps:
    """Forward passes of one request. `rows` int32 `[rows]`: the one that wrote each row, 0 where none did; `tokens`
    int32 `[R]`: the one behind each sampled token's log-prob; `weights`: ascending by `first`.
    """

    rows: Forwards
    tokens: Forwards
    weights: tuple[Weights, ...]


class StaleRows(NamedTuple):
    """Rows of token positions `[begin, end)` that are not those behind the log-probs that depend on them.

    `wrote`: weight version under which they were written (-1: by no forward pass); `needed`: the one behind the
    log-prob. `reason`: `version` (the two differ), `rewritten` (same weights, another pass), `unwritten`.
    """

    begin: int
    end: int
    wrote: int
    needed: int
    reason: Reason


def pack(rows: Forwards, tokens: Forwards, weights: Sequence[Weights]) -> dict[str, Any]:
    """Return the stamps as plain values that pickle and JSON both carry, about 0.1 byte per row.

    Passes ascend by one along a generation, so differences between neighbours compress to almost nothing. Only the
    weights that the stamps refer to are sent.
    """
    return {
        "format": FORMAT,
        "rows": _to_text(rows),
        "tokens": _to_text(tokens),
        "weights": _referred(rows, tokens, weights),
    }


def to_bytes(rows: Forwards, tokens: Forwards, weights: Sequence[Weights]) -> bytes:
    """Return the stamps as they lie beside rows in shared memory: int32 `[rows]`, int32 `[tokens]`, weights as JSON."""
    return rows.tobytes() + tokens.tobytes() + json.dumps(_referred(rows, tokens, weights)).encode()


def from_bytes(data: bytes, rows: int, tokens: int) -> Stamps | None:
    """Return the stamps of `to_bytes` for `rows` rows and `tokens` sampled tokens; None when there are none.

    Raises `RoutingError` for stamps that are malformed or belong to another answer.
    """
    if not data:
        return None
    size = 4 * (rows + tokens)
    try:
        forwards = np.frombuffer(data[:size], np.int32)
        weights = _weights_of(data[size:])
    except ValueError as error:
        raise RoutingError(f"the stamps of {rows} rows and {tokens} tokens cannot be read ({error})") from error
    return Stamps(forwards[:rows], forwards[rows:], weights)


# The answers of a step name the same few.
@lru_cache(maxsize=64)
def _weights_of(text: bytes) -> tuple[Weights, ...]:
    return _weights(json.loads(text))


def unpack(meta: Mapping[str, Any], rows: int, tokens: int) -> Stamps | None:
    """Return the stamps of a finished request for `rows` rows and `tokens` sampled tokens; None when there are none.

    `meta` is the answer's `meta_info`. SGLang sends one value per output token under a key that is not its own; the
    plugin fills the last one. Raises `RoutingError` for stamps that are malformed or belong to another answer.
    """
    values = meta.get(KEY)
    found = [value for value in values if value is not None] if isinstance(values, list) else values
    if not found:
        return None
    value = found[-1] if isinstance(found, list) else found
    if not isinstance(value, Mapping) or value.get("format") != FORMAT:
        raise RoutingError(f"{KEY} is {str(value)[:80]!r}; stamps of format {FORMAT} are required, update the plugin")
    return Stamps(
        rows=_from_text(value.get("rows"), rows, "rows"),
        tokens=_from_text(value.get("tokens"), tokens, "sampled tokens"),
        weights=_weights(value.get("weights")),
    )


def stamped(
    trace: RoutingTrace, stamps: Stamps, prompt_len: int, begin: int = 0
) -> tuple[RoutingTrace, tuple[StaleRows, ...]]:
    """Return the record with one span per run of rows of one weight version, `exact`, and the rows that are stale.

    `begin` is the position of the first row. Raises `RoutingError` where versions cannot be told apart.
    """
    order, labels = _versions(stamps)
    if _is_plain(stamps, prompt_len, begin):
        (version,) = labels.values()
        return replace(trace, spans=(Span(begin, begin + len(stamps.rows), version),), provenance="exact"), ()
    wrote = np.where(stamps.rows > 0, order[_index(stamps, stamps.rows)], UNWRITTEN)
    spans = tuple(
        Span(begin + first, begin + last, UNWRITTEN if wrote[first] < 0 else labels[int(wrote[first])])
        for first, last in _runs(wrote)
    )
    return replace(trace, spans=spans, provenance="exact"), _stale(stamps, order, labels, prompt_len, begin)


def with_provenance(
    trace: RoutingTrace, meta: Mapping[str, Any] | bytes, *, num_tokens: int, prompt_len: int, begin: int = 0
) -> tuple[RoutingTrace, tuple[StaleRows, ...]]:
    """Return the record of an answer of `num_tokens` tokens as its stamps in `meta` say, and its stale rows.

    `meta`: the answer's `meta_info`, or the bytes that lay beside its rows. `begin` is the position of the first row.
    Without stamps the record stays as it is, `unknown`. Raises
    `RoutingError` for stamps that are malformed or name no versions.
    """
    read = from_bytes if isinstance(meta, bytes) else unpack
    stamps = read(meta, trace.rows, num_tokens - prompt_len)  # type: ignore[arg-type]  # one reader for each kind
    return (trace, ()) if stamps is None else stamped(trace, stamps, prompt_len, begin)


def describe(stale: Sequence[StaleRows]) -> str:
    """Return one line that names rows and versions, for errors, reports and events."""
    words = {
        "version": "written under weights {0.wrote}, their log-probs under {0.needed}",
        "rewritten": "written again under weights {0.wrote} after their log-probs (retraction, or rows of a sibling)",
        "unwritten": "written by no forward pass (restored or foreign KV), their log-probs under weights {0.needed}",
    }
    parts = [f"rows {rows.begin} to {rows.end - 1} {words[rows.reason].format(rows)}" for rows in stale]
    return "; ".join(parts)


def count(stale: Sequence[StaleRows]) -> int:
    """Return how many rows are stale."""
    return sum(rows.end - rows.begin for rows in stale)


def cut(stale: Sequence[StaleRows], begin: int) -> tuple[StaleRows, ...]:
    """Return the stale rows of token positions from `begin` on."""
    return tuple(rows._replace(begin=max(rows.begin, begin)) for rows in stale if rows.end > begin)


def settle(trace: RoutingTrace, stale: Sequence[StaleRows], tokens: TokenIds, policy: OnStale) -> RoutingTrace | None:
    """Apply `routing.on_stale`: return the record to train on, None for a sample that is to be dropped.

    `native_rows` cuts the stale rows out, so that the trainer's own router serves them. Raises `RoutingError` under
    `fail`.
    """
    if not stale:
        return trace
    if policy == "fail":
        raise RoutingError(
            f"{count(stale)} of {trace.rows} rows are stale: {describe(stale)} "
            "(routing.on_stale: native_rows would let the trainer route them, drop_sample would leave the sample out)"
        )
    return None if policy == "drop_sample" else without(trace, stale, tokens)


def without(trace: RoutingTrace, stale: Sequence[StaleRows], tokens: TokenIds) -> RoutingTrace:
    """Return the record without the stale rows; `tokens` `[S]` are the sequence's ids, for the checksum."""
    where = trace.positions()
    keep = np.ones(len(where), dtype=np.bool_)
    for rows in stale:
        keep &= (where < rows.begin) | (where >= rows.end)
    versions = np.concatenate(
        [np.empty(0, np.int64), *(np.full(s.end - s.begin, s.weight_version, np.int64) for s in trace.spans)]
    )
    left, versions = where[keep], versions[keep]
    # Position minus rank is constant along rows that touch.
    groups = _runs(np.stack([left - np.arange(len(left)), versions], axis=1))
    experts = np.ascontiguousarray(trace.experts[keep])
    experts.flags.writeable = False
    return replace(
        trace,
        experts=experts,
        spans=tuple(Span(int(left[a]), int(left[b - 1]) + 1, int(versions[a])) for a, b in groups),
        crc32=checksum(experts, tokens),
    )


def _is_plain(stamps: Stamps, prompt_len: int, begin: int) -> bool:
    """Tell in few operations whether one set of weights wrote every row where it was due, as nearly always.

    Whatever else there is, is for `_stale` to name.
    """
    if len(stamps.weights) != 1 or not len(stamps.tokens) or not len(stamps.rows):
        return False
    prompt = max(prompt_len - begin, 0)
    due = stamps.tokens[max(begin - prompt_len, 0) + 1 :]
    first = max(stamps.weights[0].first, 1)
    return bool(
        np.array_equal(stamps.rows[prompt:], due)
        and stamps.rows.min() >= first
        and stamps.tokens[0] >= stamps.rows[:prompt].max(initial=first)
    )


def _stale(
    stamps: Stamps, order: NDArray[np.int64], labels: Mapping[int, int], prompt_len: int, begin: int
) -> tuple[StaleRows, ...]:
    if not len(stamps.tokens) or not len(stamps.rows):
        return ()  # nothing was sampled, so no log-prob depends on a row
    where = begin + np.arange(len(stamps.rows))
    needed = stamps.tokens[np.maximum(where + 1 - prompt_len, 0)]
    unwritten = stamps.rows == 0
    wrote, due = order[_index(stamps, stamps.rows)], order[_index(stamps, needed)]
    # A decode step writes the row of its own input token; another number there is another request's or a later pass.
    another = (stamps.rows > needed) | ((where >= prompt_len) & (stamps.rows != needed))
    reason = np.select([unwritten, wrote != due, another], [3, 2, 1], default=0)
    names: dict[int, Reason] = {1: "rewritten", 2: "version", 3: "unwritten"}
    key = np.stack([reason, np.where(unwritten, UNWRITTEN, wrote), due], axis=1)
    return tuple(
        StaleRows(
            int(where[a]), int(where[b - 1]) + 1,
            UNWRITTEN if unwritten[a] else labels[int(wrote[a])], labels[int(due[a])], names[int(reason[a])],
        )
        for a, b in _runs(key)
        if reason[a]
    )  # fmt: skip


def _index(stamps: Stamps, forwards: Forwards) -> NDArray[np.int64]:
    """Return which entry of `weights` each pass ran under; 0 for pass 0."""
    firsts = np.array([entry.first for entry in stamps.weights], dtype=np.int64)
    found = np.searchsorted(firsts, forwards, side="right").astype(np.int64) - 1
    if ((found < 0) & (forwards > 0)).any():
        raise RoutingError(f"a row was stamped before pass {firsts[:1].tolist()}, the first whose weights are named")
    return np.maximum(found, 0)


def _versions(stamps: Stamps) -> tuple[NDArray[np.int64], dict[int, int]]:
    """Return of every entry of `weights` an id that is equal for equal weights, and the integer version of each id."""
    known: dict[tuple[str, int], int] = {}
    order = np.array([known.setdefault((entry.label, entry.updates), len(known)) for entry in stamps.weights])
    labels: dict[int, int] = {}
    for (label, updates), identity in known.items():
        try:
            version = int(label)
        except ValueError:
            raise RoutingError(
                f"the engine calls its weights {label!r}; a record needs integers: start it with weight_version=0 and "
                "pass weight_version with every update"
            ) from None
        if version in labels.values():
            raise RoutingError(
                f"the engine's weights changed (update {updates}) and are still called {version}; pass a new "
                "weight_version with every update"
            )
        labels[identity] = version
    return order.astype(np.int64), labels


def _runs(values: NDArray[Any]) -> list[tuple[int, int]]:
    """Return `(begin, end)` of every run of equal values along the first axis."""
    if not len(values):
        return []
    changed = values[1:] != values[:-1]
    cuts = np.flatnonzero(changed.any(axis=1) if changed.ndim > 1 else changed) + 1
    edges = [0, *cuts.tolist(), len(values)]
    return list(pairwise(edges))


def _referred(rows: Forwards, tokens: Forwards, weights: Sequence[Weights]) -> list[list[Any]]:
    """Return the weights that stamps refer to."""
    if len(weights) == 1:
        return [list(weights[0])]
    used = np.concatenate([rows, tokens])
    firsts = np.array([entry.first for entry in weights], dtype=np.int64)
    wanted = np.unique(np.searchsorted(firsts, used[used > 0], side="right") - 1)
    return [list(weights[int(i)]) for i in wanted if i >= 0]


def _to_text(forwards: Forwards) -> str:
    steps = np.diff(forwards.astype("<i4"), prepend=np.int32(0)).astype("<i4")
    return binascii.b2a_base64(zlib.compress(steps.tobytes(), level=1), newline=False).decode("ascii")


def _from_text(text: Any, length: int, what: str) -> Forwards:
    """Decode one stamp per row or token; never more memory than `length` of them take, whatever the text says."""
    try:
        inflater = zlib.decompressobj()
        raw = inflater.decompress(binascii.a2b_base64(text, strict_mode=True), 4 * length + 1)
    except (binascii.Error, zlib.error, TypeError, ValueError) as error:
        raise RoutingError(f"the stamps of the {what} cannot be decoded ({error}); truncated in transport?") from error
    if len(raw) != 4 * length:
        raise RoutingError(f"{len(raw) / 4:g} or more stamps came back for {length} {what}")
    forwards = np.cumsum(np.frombuffer(raw, dtype="<i4"), dtype=np.int64)
    if length and not 0 <= int(forwards.min()) <= int(forwards.max()) < 2**31:
        raise RoutingError(f"a stamp of the {what} is no number of a forward pass ({int(forwards.min())})")
    return forwards.astype(np.int32)


def _weights(value: Any) -> tuple[Weights, ...]:
    try:
        entries = tuple(Weights(int(first), str(label), int(updates)) for first, label, updates in value)
    except (TypeError, ValueError) as error:
        raise RoutingError(f"the stamps name their weights as {str(value)[:80]!r} ({error})") from error
    firsts = [entry.first for entry in entries]
    if not entries or firsts != sorted(set(firsts)) or firsts[0] < 1 or firsts[-1] >= 2**31:
        raise RoutingError(f"the stamps name weights from passes {firsts[:8]} on; ascending numbers are required")
    return entries
