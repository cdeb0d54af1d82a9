"""Which tokens carry the log-prob difference: what a step keeps of single tokens, bounded whatever the batch.

Every `metrics.tokens_every` steps the trainer leaves one line in `RUN/tokens.jsonl`: how d = log p_train - log
p_rollout is distributed, the tokens with the largest |d|, and the sequences that hold them. The report, W&B and a
reader with `jq` see the same line. numpy only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Bins of d in nats; what lies outside is counted in the outermost bin.
EDGES: Floats = np.linspace(-1.0, 1.0, 81)
# |d| above which tokens are counted, 8 thresholds to a decade.
TAIL: Floats = np.geomspace(1e-4, 10.0, 41)
SEQUENCES = 4
# Response tokens that are kept of one sequence, around its worst.
WINDOW = 128
# Characters of the prompt, and tokens around a worst token, that are kept as text.
_PROMPT, _BEFORE, _AFTER = 400, 12, 6


@dataclass(frozen=True, slots=True)
class Difference:
    """Distribution of d over the tokens of a pass.

    `counts`: tokens in each bin of `EDGES`; `above`: tokens whose |d| exceeds each value of `TAIL`.
    """

    counts: tuple[int, ...]
    above: tuple[int, ...]

    @classmethod
    def of(cls, d: Floats) -> Difference:
        """Count `d` `[tokens]`, nats."""
        inside = np.clip(d, EDGES[0], EDGES[-1])
        ordered = np.sort(np.abs(d))
        above = len(d) - np.searchsorted(ordered, TAIL, side="right")
        return cls(tuple(np.histogram(inside, EDGES)[0].tolist()), tuple(above.tolist()))


@dataclass(frozen=True, slots=True)
class TokenColumns:
    """What is known of some response tokens, in order; log-probs in nats.

    `ids`; `texts`: each decoded alone; `rollout`, `train`: log-probs; `layers`: for each token the global indices of
    the MoE layers whose own top-k set differs from the record, in the pass that trains. `native`, `native_layers`: the
    same of the pass without replay, None where the step did not run it.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    rollout: tuple[float, ...]
    train: tuple[float, ...]
    layers: tuple[tuple[int, ...], ...]
    native: tuple[float, ...] | None = None
    native_layers: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class TracedSequence:
    """A sequence that holds one of the worst tokens, `WINDOW` response tokens of it.

    `prompt`: the end of its text; `first`: position in the response of the first token kept; `length`: response tokens.
    """

    group: int
    member: int
    reward: float
    finish: str
    prompt: str
    length: int
    first: int
    tokens: TokenColumns


@dataclass(frozen=True, slots=True)
class WorstTokens:
    """The tokens of a step with the largest |d|, worst first; where each is, and the text round it."""

    groups: tuple[int, ...]
    members: tuple[int, ...]
    positions: tuple[int, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    tokens: TokenColumns

    def __len__(self) -> int:
        return len(self.groups)


@dataclass(frozen=True, slots=True)
class TokenReport:
    """What one step keeps of its tokens. `total`: response tokens of the step; `moe_layers`: of the model."""

    step: int
    total: int
    moe_layers: tuple[int, ...]
    difference: Difference
    native_difference: Difference | None
    worst: WorstTokens
    sequences: tuple[TracedSequence, ...]

    def to_row(self) -> dict[str, Any]:
        """Return the line of `tokens.jsonl`."""
        return {**asdict(self), "edges": EDGES.tolist(), "tail": [float(f"{value:.4g}") for value in TAIL]}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> TokenReport:
        """Read a line of `tokens.jsonl` back."""
        native = row["native_difference"]
        return cls(
            step=row["step"],
            total=row["total"],
            moe_layers=tuple(row["moe_layers"]),
            difference=_difference(row["difference"]),
            native_difference=None if native is None else _difference(native),
            worst=WorstTokens(
                **{key: tuple(value) for key, value in row["worst"].items() if key != "tokens"},
                tokens=_columns(row["worst"]["tokens"]),
            ),
            sequences=tuple(TracedSequence(**{**one, "tokens": _columns(one["tokens"])}) for one in row["sequences"]),
        )


@dataclass(frozen=True, slots=True)
class Pass:
    """Log-probs float64 `[T]` of a step's response tokens in one pass, and what its routers would have changed.

    `layers`: takes int64 `[n]` indices of response tokens, returns bool `[n, moe layers]`; collective where the trainer
    has several ranks.
    """

    logprobs: Floats
    layers: Callable[[Ints], Bools]


@dataclass(frozen=True, slots=True)
class SequenceFacts:
    """What the report says of a sequence besides its tokens: int `tokens` `[S]`, prompt included."""

    group: int
    member: int
    reward: float
    finish: str
    prompt_len: int
    tokens: NDArray[np.integer[Any]]


def observes_tokens(every: int, step: int) -> bool:
    """Tell whether this step (1-based) keeps a `TokenReport`: the first, then every `metrics.tokens_every`; 0 never."""
    return every > 0 and (step - 1) % every == 0


def observe(
    step: int,
    sequences: Sequence[SequenceFacts],
    rollout: Floats,
    train: Pass,
    native: Pass | None,
    moe_layers: Sequence[int],
    decode: Callable[[Sequence[int]], str],
    *,
    worst: int,
) -> TokenReport:
    """Return the report of a step; `rollout` `[T]` nats, the response tokens of the `sequences` one after another.

    `worst`: tokens that are kept with their neighbourhood. Ties go to the earlier token, so every rank finds the same.
    """
    offsets = np.concatenate([[0], np.cumsum([len(one.tokens) - one.prompt_len for one in sequences])]).astype(np.int64)
    d = train.logprobs - rollout
    tokens = np.argsort(-np.abs(d), kind="stable")[:worst].astype(np.int64)
    owners = np.searchsorted(offsets, tokens, side="right") - 1
    shown = {int(i): _window(offsets, int(i), int(t)) for i, t in reversed(list(zip(owners, tokens, strict=True)))}
    kept = list(dict.fromkeys(owners.tolist()))[:SEQUENCES]
    chosen = np.unique(np.concatenate([tokens, *(np.arange(*shown[i]) for i in kept)]))
    flat = np.concatenate([np.empty(0, np.int64), *(one.tokens[one.prompt_len :] for one in sequences)])
    table = _Table(chosen, flat, rollout, train, native, moe_layers, decode)
    return TokenReport(
        step=step,
        total=len(d),
        moe_layers=tuple(moe_layers),
        difference=Difference.of(d),
        native_difference=None if native is None else Difference.of(native.logprobs - rollout),
        worst=_worst(sequences, offsets, tokens, owners, table, decode),
        sequences=tuple(_traced(sequences[i], int(offsets[i]), shown[i], table, decode) for i in kept),
    )


class _Table:
    """Everything that is known of the chosen tokens; asks the routers once, for all of them."""

    def __init__(
        self,
        chosen: Ints,
        flat: NDArray[np.integer[Any]],
        rollout: Floats,
        train: Pass,
        native: Pass | None,
        moe_layers: Sequence[int],
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self._chosen, self._flat, self._rollout, self._decode = chosen, flat, rollout, decode
        self._moe_layers = np.array(moe_layers)
        self._train, self._differs = train.logprobs, train.layers(chosen)
        self._native = None if native is None else native.logprobs
        self._native_differs = None if native is None else native.layers(chosen)

    def columns(self, tokens: Ints) -> TokenColumns:
        """Return the columns of some of the chosen tokens."""
        ids = tuple(int(i) for i in self._flat[tokens])
        places = np.searchsorted(self._chosen, tokens)
        return TokenColumns(
            ids=ids,
            texts=tuple(self._decode([i]) for i in ids),
            rollout=_rounded(self._rollout[tokens]),
            train=_rounded(self._train[tokens]),
            layers=self._named(self._differs[places]),
            native=None if self._native is None else _rounded(self._native[tokens]),
            native_layers=None if self._native_differs is None else self._named(self._native_differs[places]),
        )

    def _named(self, differs: Bools) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(int(layer) for layer in self._moe_layers[row]) for row in differs)


def _window(offsets: Ints, i: int, token: int) -> tuple[int, int]:
    """Return the range of tokens of sequence `i` that is kept around `token`."""
    begin, end = int(offsets[i]), int(offsets[i + 1])
    first = min(max(begin, token - WINDOW // 2), max(begin, end - WINDOW))
    return first, min(end, first + WINDOW)


def _worst(
    sequences: Sequence[SequenceFacts],
    offsets: Ints,
    tokens: Ints,
    owners: Ints,
    table: _Table,
    decode: Callable[[Sequence[int]], str],
) -> WorstTokens:
    positions = (tokens - offsets[owners]).tolist()
    holders = [sequences[i] for i in owners]
    places = [one.prompt_len + position for one, position in zip(holders, positions, strict=True)]

    def text(one: SequenceFacts, begin: int, end: int) -> str:
        return decode([int(i) for i in one.tokens[max(0, begin) : end]])

    return WorstTokens(
        groups=tuple(one.group for one in holders),
        members=tuple(one.member for one in holders),
        positions=tuple(positions),
        before=tuple(text(one, place - _BEFORE, place) for one, place in zip(holders, places, strict=True)),
        after=tuple(text(one, place + 1, place + 1 + _AFTER) for one, place in zip(holders, places, strict=True)),
        tokens=table.columns(tokens),
    )


def _traced(
    one: SequenceFacts, offset: int, shown: tuple[int, int], table: _Table, decode: Callable[[Sequence[int]], str]
) -> TracedSequence:
    return TracedSequence(
        group=one.group,
        member=one.member,
        reward=one.reward,
        finish=one.finish,
        prompt=decode([int(i) for i in one.tokens[: one.prompt_len]])[-_PROMPT:],
        length=len(one.tokens) - one.prompt_len,
        first=shown[0] - offset,
        tokens=table.columns(np.arange(*shown)),
    )


def _rounded(values: Floats) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values)


def _difference(row: Mapping[str, Any]) -> Difference:
    return Difference(tuple(row["counts"]), tuple(row["above"]))


def _columns(row: Mapping[str, Any]) -> TokenColumns:
    def nested(values: Any) -> Any:
        return tuple(tuple(value) if isinstance(value, list) else value for value in values)

    columns: dict[str, Any] = {key: None if value is None else nested(value) for key, value in row.items()}
    return TokenColumns(**columns)
