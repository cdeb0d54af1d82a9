"""Every number that R3 reports about mismatch, routers and replay, as pure functions of numpy arrays.

Formulas and keys: docs/metrics.md. Throughout, d_t = log p_train(a_t) - log p_rollout(a_t) over response tokens, in
nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
EXTREME_RATIOS = (1.2, 1.5, 2.0, 5.0)
# exp() of a log-ratio beyond 20 only overflows; verl clamps at the same value.
MAX_LOG_RATIO = 20.0
# Windows of rows that the audit of one pass looks at, at most (`r3.audit`).
AUDIT_WINDOWS = 32


def mismatch(train: ArrayLike, rollout: ArrayLike, lengths: ArrayLike) -> dict[str, float]:
    """Return every `mismatch/*` value for one set of response tokens; empty for an empty set.

    `train`, `rollout`: `[tokens]` log-probs in nats of the same sampled tokens at the same temperature, sequences one
    after another. `lengths`: `[sequences]` tokens of each. All sums run in float64, small differences through expm1;
    d is cut to +-20 before an exponential. Expected: equal sides give 0, or 1 for the keys marked *.

    | key | formula | unit | range, expected | source |
    |---|---|---|---|---|
    | k1 | mean(-d) | nats | any sign, abs(k1) < 0.1 | Schulman 2020; R3 (arXiv 2510.11370) section 3 |
    | k2 | mean(d^2 / 2) | nats | >= 0, near k3 | Schulman 2020 |
    | k3 | mean(exp(d) - 1 - d) | nats | >= 0; dense 1e-5 to 1e-3 | Schulman 2020; R3 section 3 |
    | abs_mean, abs_p99, abs_max | of abs(d) | nats | >= 0, mean below 0.1 | slime, SkyRL |
    | extreme_<tau> | mean(abs(d) > ln tau) | share | [0, 1], 0 for 2 and 5 | R3 section 3, F(tau) |
    | mult_prob_error* | mean(exp(abs(d))) | ratio | >= 1, below 1.05 | NeMo-RL token_mult_prob_error |
    | pearson* | correlation of exp(train), exp(rollout) | - | [-1, 1], above 0.99 | verl |
    | log_ppl_diff, chi2_token, ess_token*, ess_sequence* | `sequence_mismatch` | | | verl rollout_corr |
    """
    lp_train, lp_rollout = np.asarray(train, np.float64), np.asarray(rollout, np.float64)
    if not lp_train.size:
        return {}
    d = lp_train - lp_rollout
    size = np.abs(d)
    return {
        "k1": float(np.mean(-d)),
        "k2": float(np.mean(d * d / 2)),
        "k3": float(np.mean(k3_terms(d))),
        "abs_mean": float(size.mean()),
        "abs_p99": float(np.quantile(size, 0.99)),
        "abs_max": float(size.max()),
        **{f"extreme_{_name(tau)}": float(np.mean(size > np.log(tau))) for tau in EXTREME_RATIOS},
        "mult_prob_error": float(np.mean(np.exp(np.minimum(size, MAX_LOG_RATIO)))),
        "pearson": pearson(np.exp(lp_train), np.exp(lp_rollout)),
        **sequence_mismatch(d, np.asarray(lengths, np.int64)),
    }


def k3_terms(d: Floats) -> Floats:
    """Return exp(d) - 1 - d per token `[tokens]`, in nats, never negative (Schulman's k3).

    Its mean over rollout samples is unbiased for KL(rollout || train).
    """
    clamped = np.clip(d, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return np.expm1(clamped) - clamped


def sequence_mismatch(d: Floats, lengths: NDArray[np.int64]) -> dict[str, float]:
    """Return perplexity gap, chi-square and effective sample sizes.

    `d`: `[tokens]` log-ratios in nats; `lengths`: `[sequences]`. rho = exp(d) of a token, w = exp(sum of d) of a
    sequence. Source: verl rollout_corr.

    - `log_ppl_diff`: mean over sequences of the mean of -d, nats (rollout minus train, verl's sign); around 0.
    - `chi2_token`: mean(rho^2) - 1; around 0, at least -1.
    - `ess_token`, `ess_sequence`: (sum of rho)^2 / (n sum of rho^2), the same of w; in (0, 1], near 1.
    """
    lengths = lengths[lengths > 0]
    sums = np.add.reduceat(d, np.concatenate([[0], np.cumsum(lengths)[:-1]]))
    rho = np.exp(np.clip(d, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    weights = np.exp(np.clip(sums, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    return {
        "log_ppl_diff": float(np.mean(-sums / lengths)),
        "chi2_token": float(np.mean(rho * rho) - 1),
        "ess_token": effective_sample_size(rho),
        "ess_sequence": effective_sample_size(weights),
    }


def effective_sample_size(weights: Floats) -> float:
    """Return (sum w)^2 / (n sum w^2), 1 for equal weights and 1/n when one weight carries all."""
    return float(weights.sum() ** 2 / (len(weights) * np.sum(weights * weights)))


def pearson(a: Floats, b: Floats) -> float:
    """Return the Pearson correlation of two probability vectors `[tokens]`, in [-1, 1].

    For a constant vector 1 if both are equal, else 0.
    """
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt(np.sum(a * a) * np.sum(b * b)))
    if scale == 0.0:
        return 1.0 if np.array_equal(a, b) else 0.0
    return float(np.sum(a * b) / scale)


def gain(native: Mapping[str, float], replayed: Mapping[str, float]) -> dict[str, float]:
    """Return `gain_k3` = native k3 / replayed k3 of the same batch, a factor; empty when the divisor is 0.

    Expected: above 1; about 2 in the R3 paper, section 3. Its interval is wide where few tokens carry k3.
    """
    if not native or not replayed or replayed["k3"] == 0.0:
        return {}
    return {"gain_k3": native["k3"] / replayed["k3"]}


def prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    """Return the values under `prefix/key`."""
    return {f"{prefix}/{key}": value for key, value in values.items()}


@dataclass(frozen=True, slots=True)
class RouterCounts:
    """Sums over the router rows of one pass; adding two gives the sums over both.

    A row is one token position of one trajectory. `disagree` int64 `[layers]`: rows whose own top-k *set* differs from
    the recorded one; `compared`: rows that were compared (the same in every layer); `disagree_any`: rows that differ in
    any layer. `overlap` float64 `[layers, 3, 2]`: sum over audited rows of |own & recorded| / k with the record shifted
    by -1, 0, +1 positions, rows of prompt and of sampled tokens apart; `overlap_pairs` int64: their number; `windows`
    float64 `[AUDIT_WINDOWS, 2]`: the same sum at lag 0 over the rows of a window and all layers, and its (row, layer)
    pairs. `loads` int64 `[layers, experts]`: how often the record chose each expert, counted in passes that compare the
    own choice with it. `mismatched_ids`: recorded ids that replay left out. `required`: rows that a trained token's
    log-prob depends on and that the engine captured; `replayed`: those of them that were forced; `native`: rows that
    were not, last tokens among them; `missing`: required rows without a record; `pads`.
    """

    disagree: NDArray[np.int64]
    overlap: Floats
    overlap_pairs: NDArray[np.int64]
    windows: Floats
    loads: NDArray[np.int64]
    compared: int = 0
    disagree_any: int = 0
    mismatched_ids: int = 0
    required: int = 0
    replayed: int = 0
    native: int = 0
    missing: int = 0
    pads: int = 0

    @classmethod
    def zero(cls, layers: int, experts: int) -> RouterCounts:
        """Return the sums over no row at all, for a model with that many MoE layers and experts in each."""
        lags = (layers, 3, 2)
        return cls(
            np.zeros(layers, np.int64),
            np.zeros(lags, np.float64),
            np.zeros(lags, np.int64),
            np.zeros((AUDIT_WINDOWS, 2), np.float64),
            np.zeros((layers, experts), np.int64),
        )

    def __add__(self, other: RouterCounts) -> RouterCounts:
        return RouterCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def disagreement(counts: RouterCounts, kind: str, layers: Sequence[int]) -> dict[str, float]:
    """Return `router/<kind>_disagree_*` of one pass; `kind`: `native` (no replay), `shadow` (inside the replayed pass).

    Shares in [0, 1] of (token, layer) pairs, of tokens in any layer, and of the tokens of a layer, whose own top-k set
    is not the recorded one. `layers`: global index of each MoE layer. Expected: shadow below native. R3 paper, section
    3: about 0.1 and 0.94 natively for Qwen3-30B-A3B.
    """
    if not counts.compared:
        return {}
    pairs = counts.compared * len(counts.disagree)
    values = {
        f"router/{kind}_disagree_token_layer": float(counts.disagree.sum() / pairs),
        f"router/{kind}_disagree_token": counts.disagree_any / counts.compared,
    }
    for layer, differing in zip(layers, counts.disagree, strict=True):
        values[f"router/{kind}_disagree_layer/{layer}"] = float(differing / counts.compared)
    return values


def replay_health(counts: RouterCounts) -> dict[str, float]:
    """Return coverage, the row classes and mismatched ids of the replayed passes of a step.

    - `coverage`: rows replayed with their record / recorded rows that a trained token depends on; must be 1.
    - `native_rows`, `missing_rows`, `pad_rows`: shares of all rows in [0, 1]; a last token is native, whatever ids it
      takes.
    - `mismatched_ids`: recorded ids that the router did not use, a count; must be 0.
    """
    total = counts.replayed + counts.native + counts.pads
    if not total:
        return {}
    return {
        "router/coverage": counts.replayed / counts.required if counts.required else 1.0,
        "router/native_rows": counts.native / total,
        "router/missing_rows": counts.missing / total,
        "router/pad_rows": counts.pads / total,
        "router/mismatched_ids": float(counts.mismatched_ids),
    }


def load_imbalance(loads: NDArray[np.int64]) -> Floats:
    """Return the largest over the mean expert load of each layer of `loads` `[layers, experts]`, 0 without rows.

    In [1, experts / k]: 1 is balanced, experts / k means that some expert gets every row. prime-rl's max_vio is this
    minus 1.
    """
    mean = loads.mean(1)
    return np.where(mean > 0, loads.max(1) / np.maximum(mean, 1e-300), 0.0)


def load_metrics(loads: NDArray[np.int64], top_k: int) -> dict[str, float]:
    """Return the expert loads of a step's records `[layers, experts]` in three numbers; empty without a record.

    - `router/load_max_over_mean`: `load_imbalance` of the worst layer.
    - `router/dead_experts`: share of (layer, expert) pairs that no row chose, in [0, 1]; it falls with more rows.
    - `router/dead_layers`: layers that use no more than `top_k` experts at all, so that every row is routed alike;
      must be 0.
    """
    if not loads.any():
        return {}
    return {
        "router/load_max_over_mean": float(load_imbalance(loads).max()),
        "router/dead_experts": float((loads == 0).mean()),
        "router/dead_layers": float(((loads > 0).sum(1) <= top_k).sum()),
    }


def load_drift(loads: NDArray[np.int64], reference: NDArray[np.int64]) -> Floats:
    """Return the total variation distance of two expert histograms `[layers, experts]`, per layer.

    sum(abs(p - q)) / 2 of the shares p and q, in [0, 1]: 0 is the same histogram, 1 means no expert in common. Layers
    without rows on one side give 0. Two samples of n choices from one histogram differ by about sqrt(experts / n).
    """
    sums = loads.sum(1), reference.sum(1)
    p, q = (counts / np.maximum(total, 1)[:, None] for counts, total in zip((loads, reference), sums, strict=True))
    return np.where((sums[0] > 0) & (sums[1] > 0), np.abs(p - q).sum(1) / 2, 0.0)


def bootstrap_interval(
    values: Floats, *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of `values` `[n]` (one value per independent sequence)."""
    generator = np.random.default_rng(seed)
    means = np.array([values[generator.integers(0, len(values), len(values))].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _name(tau: float) -> str:
    return f"{tau:g}".replace(".", "p")
