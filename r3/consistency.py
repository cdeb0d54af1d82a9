"""The consistency table: how far two implementations of one policy are apart, with bootstrap intervals; numpy only.

Answers to one prompt are not independent, so the bootstrap draws whole *clusters* (prompts) with replacement. Every
number of the table is a function of sums over tokens and sequences, so a resample is a weighted sum of cluster sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from r3.metrics import MAX_LOG_RATIO, Floats, k3_terms

Ints = NDArray[np.int64]
RESAMPLES = 2000
LEVEL = 0.95
# Below this an interval would say more about the resampling than about the data.
MIN_CLUSTERS = 8
# What is summed: over tokens, then over sequences.
_FEATURES = ("tokens", "-d", "k3", "abs", ">1.2", ">1.5", ">2", "rho", "rho2", "sequences", "w", "w2")
# Weights held at a time, at 16 bytes each.
_HELD = 1 << 22


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its percentile bootstrap interval; both ends are None with too few clusters."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Drawn:
    """Sums of one variant: `total` `[features]` over all clusters, and `resamples` `[resamples, features]`.

    `resamples`: over clusters drawn with replacement; None with too few clusters.
    """

    total: Floats
    resamples: Floats | None


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    `values`: estimates by column; `alarms`: rules that a training step would raise, None where none was applied.
    """

    key: str
    name: str
    tokens: int
    sequences: int
    values: Mapping[str, Estimate]
    alarms: tuple[str, ...] | None = None


def cluster_sums(d: Floats, lengths: Ints, clusters: Ints) -> Floats:
    """Return `[clusters, features]` sums of one variant.

    `d` `[tokens]` log p_train - log p_rollout in nats, sequences one after another; `lengths`, `clusters` `[sequences]`
    tokens and cluster of each, the clusters in any order. d is cut to +-20 before an exponential.
    """
    keep = lengths > 0
    lengths, clusters = lengths[keep], np.unique(clusters[keep], return_inverse=True)[1]
    size = np.abs(d)
    rho = np.exp(np.clip(d, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    per_token = [np.ones_like(d), -d, k3_terms(d), size, *(size > np.log(tau) for tau in (1.2, 1.5, 2)), rho, rho * rho]
    begins = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    w = np.exp(np.clip(np.add.reduceat(d, begins), -MAX_LOG_RATIO, MAX_LOG_RATIO))
    sequences = [np.add.reduceat(np.asarray(part, np.float64), begins) for part in per_token]
    table = np.stack([*sequences, np.ones_like(w), w, w * w], 1)
    sums = np.zeros((int(clusters.max()) + 1, len(_FEATURES)))
    np.add.at(sums, clusters, table)
    return sums


def mismatch_of(sums: Floats) -> dict[str, Floats]:
    """Return the columns of the table from sums `[..., features]`; formulas as `r3.metrics.mismatch`."""
    at = dict(zip(_FEATURES, np.moveaxis(sums, -1, 0), strict=True))
    tokens = at["tokens"]
    return {
        "k1": at["-d"] / tokens,
        "k3": at["k3"] / tokens,
        "abs_mean": at["abs"] / tokens,
        "extreme_1p2": at[">1.2"] / tokens,
        "extreme_1p5": at[">1.5"] / tokens,
        "extreme_2": at[">2"] / tokens,
        "ess_token": at["rho"] ** 2 / (tokens * at["rho2"]),
        "ess_sequence": at["w"] ** 2 / (at["sequences"] * at["w2"]),
    }


def counted(sums: Floats) -> tuple[int, int]:
    """Return the tokens and sequences in cluster sums `[clusters, features]`."""
    total = sums.sum(0)
    return int(total[_FEATURES.index("tokens")]), int(total[_FEATURES.index("sequences")])


def pass_sums(compared: int, differing: int, any_layer: int, layers: int) -> Floats:
    """Return the `[features]` of one pass's router counts: rows compared, (row, layer) pairs, and how many differ."""
    return np.array([compared, compared * layers, differing, any_layer], np.float64)


def disagreement_of(sums: Floats) -> dict[str, Floats]:
    """Return the shares of (token, layer) pairs and of tokens that route differently, from sums of `pass_sums`."""
    compared, pairs, differing, any_layer = np.moveaxis(sums, -1, 0)
    return {
        "disagree_token_layer": differing / np.maximum(pairs, 1),
        "disagree_token": any_layer / np.maximum(compared, 1),
    }


def draw(tables: Mapping[str, Floats], seed: int = 0) -> dict[str, Drawn]:
    """Return each variant's sums, from its cluster sums `[clusters, features]`.

    The same `seed` draws the same clusters of tables of one length, so that variants of the same answers are compared
    in pairs; they share one draw, which is what takes the time.
    """
    found = {key: Drawn(sums.sum(0), None) for key, sums in tables.items()}
    for clusters in {len(sums) for sums in tables.values()}:
        if clusters < MIN_CLUSTERS:
            continue
        keys = [key for key, sums in tables.items() if len(sums) == clusters]
        widths = [tables[key].shape[1] for key in keys]
        drawn = _resampled(np.concatenate([tables[key] for key in keys], 1), seed)
        for key, part in zip(keys, np.split(drawn, np.cumsum(widths)[:-1], axis=1), strict=True):
            found[key] = Drawn(found[key].total, part)
    return found


def _resampled(sums: Floats, seed: int) -> Floats:
    generator, n = np.random.default_rng(seed), len(sums)
    chunk, parts = max(1, _HELD // n), []
    for begin in range(0, RESAMPLES, chunk):
        weights = generator.multinomial(n, np.full(n, 1 / n), size=min(chunk, RESAMPLES - begin))
        parts.append(weights @ sums)
    return np.concatenate(parts)


def estimates(drawn: Drawn, formula: Callable[[Floats], Mapping[str, Floats]]) -> dict[str, Estimate]:
    """Return the values of `formula` over all clusters, each with its interval."""
    values = formula(drawn.total)
    if drawn.resamples is None:
        return {key: Estimate(float(value)) for key, value in values.items()}
    others = formula(drawn.resamples)
    return {key: _interval(float(value), others[key]) for key, value in values.items()}


def factor(above: Drawn, below: Drawn, key: str) -> Estimate | None:
    """Return the ratio of column `key` of two variants, with its interval; None where the divisor is 0.

    Variants of the same answers are to be of one `draw`, independent ones of draws of different seeds.
    """
    top, bottom = (float(mismatch_of(drawn.total)[key]) for drawn in (above, below))
    if bottom == 0:
        return None
    if above.resamples is None or below.resamples is None:
        return Estimate(top / bottom)
    drawn_top, drawn_bottom = (mismatch_of(sums)[key] for sums in (above.resamples, below.resamples))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = drawn_top / drawn_bottom
    # A resample without a single event below has no ratio: the upper end is then unbounded.
    return _interval(top / bottom, np.where(drawn_bottom == 0, np.inf, ratios))


def _interval(value: float, drawn: Floats) -> Estimate:
    # No interpolation: between a finite and an infinite ratio there is nothing.
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    return Estimate(value, float(low), float(high))


_COLUMNS = (
    ("k1", "k1", "{:.1e}"),
    ("k3", "k3 [95 %]", "{:.2e}"),
    ("abs_mean", "mean abs", "{:.1e}"),
    ("extreme_1p2", "> 1.2", "{:.1e}"),
    ("extreme_1p5", "> 1.5 [95 %]", "{:.1e}"),
    ("extreme_2", "> 2", "{:.1e}"),
    ("ess_token", "ESS token", "{:.5f}"),
    ("ess_sequence", "ESS sequence", "{:.5f}"),
    ("disagree_token_layer", "differ: token, layer", "{:.2%}"),
    ("disagree_token", "differ: token", "{:.2%}"),
)


def markdown(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the table; columns with `[95 %]` show the interval, a last one the alarms, where any has."""
    alarmed = any(row.alarms for row in rows)
    names = [name for _, name, _ in _COLUMNS] + (["alarms"] if alarmed else [])
    yield "| | " + " | ".join(names) + " |"
    yield "|" + "---|" * (len(names) + 1)
    for row in rows:
        cells = [_cell(row.values.get(key), form, "95 %" in name) for key, name, form in _COLUMNS]
        if alarmed:
            cells.append("" if row.alarms is None else ", ".join(row.alarms) or "none")
        yield f"| {row.name} | " + " | ".join(cells) + " |"


def _cell(found: Estimate | None, form: str, interval: bool) -> str:
    if found is None:
        return ""
    text = form.format(found.value) if found.value else "0"
    if not interval or found.low is None or found.high is None:
        return text
    return f"{text} [{form.format(found.low)}, {form.format(found.high)}]"
