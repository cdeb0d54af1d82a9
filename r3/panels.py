"""The panels of a dashboard, as plain data: `r3.dashboard` gives them to W&B, `r3.report` draws them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Dash = Literal["solid", "dashed", "dotted"]
Scale = Literal["linear", "log", "share"]


@dataclass(frozen=True, slots=True)
class Line:
    """One metric of a panel; `key` of docs/metrics.md, `label` in the legend."""

    key: str
    label: str
    dash: Dash = "solid"


@dataclass(frozen=True, slots=True)
class Panel:
    """Metrics over steps in one plot.

    `unit`: of the y axis; `scale`: `share` is linear near 0 and logarithmic above, for shares that may be 0; `hint`:
    what is healthy, in a few words; `limits`: fixed ends of the y axis; `stacked`: the lines add up to something;
    `smooth`: steps of the rolling mean that is drawn over the values.
    """

    name: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    hint: str
    scale: Scale = "linear"
    limits: tuple[float | None, float | None] = (None, None)
    stacked: bool = False
    smooth: int = 1


@dataclass(frozen=True, slots=True)
class Section:
    """A group of panels under one heading. `media`: W&B keys of histograms and tables that belong to it."""

    name: str
    panels: tuple[Panel, ...]
    media: tuple[str, ...] = ()


_DIFFERENCE = (
    Panel(
        "k3", "k3 of engine and trainer", "k3 [nats]",
        (
            Line("mismatch/k3", "as trained"),
            Line("mismatch_native/k3", "same batch, no replay", "dashed"),
            Line("mismatch_r2/k3", "same batch, trainer's own routes", "dotted"),
        ),
        "flat, and below the line without replay", "log",
    ),
    Panel(
        "extreme", "Tokens beyond a ratio of 1.5", "share of tokens",
        (
            Line("mismatch/extreme_1p5", "as trained"),
            Line("mismatch_native/extreme_1p5", "same batch, no replay", "dashed"),
        ),
        "at or near 0", "share",
    ),
    Panel(
        "largest", "Largest differences of a step", "|d| [nats]",
        (Line("mismatch/abs_max", "largest"), Line("mismatch/abs_p99", "99th percentile", "dashed")),
        "flat; the 99th percentile far below the largest", "log",
    ),
    Panel(
        "ess", "Effective sample size", "share of sequences",
        (
            Line("mismatch/ess_sequence", "as trained"),
            Line("mismatch_native/ess_sequence", "same batch, no replay", "dashed"),
        ),
        "near 1", limits=(0, 1.05),
    ),
)  # fmt: skip
_ROUTER = (
    Panel(
        "disagree", "Routers that disagree", "share of (token, layer) pairs",
        (
            Line("router/shadow_disagree_token_layer", "inside the replayed pass"),
            Line("router/native_disagree_token_layer", "without replay", "dashed"),
        ),
        "flat; smaller inside the replayed pass", limits=(0, None),
    ),
    Panel(
        "overlap", "Record against the trainer's own choice", "overlap of experts",
        (
            Line("router/lag0_overlap", "as recorded"),
            Line("router/lag_margin", "margin over the better neighbour", "dashed"),
        ),
        "overlap near 1, margin clearly above 0",
    ),
    Panel(
        "health", "Rows replayed with their record", "share of rows",
        (Line("router/coverage", "coverage"), Line("router/missing_rows", "missing rows", "dashed")),
        "coverage 1, missing 0", limits=(-0.04, 1.04),
    ),
    Panel(
        "load", "Expert load, worst layer", "largest over mean",
        (Line("router/load_max_over_mean", "recorded routing"),),
        "flat; 1 is balanced", limits=(0, None),
    ),
)  # fmt: skip
_REWARD = (
    Panel(
        "reward", "Reward", "mean reward",
        (Line("rollout/reward_mean", "sampled"), Line("eval/reward_mean", "held-out, greedy", "dashed")),
        "rises", smooth=10,
    ),
    Panel(
        "entropy", "Entropy of the policy", "nats per token",
        (Line("train/entropy", "entropy"),), "falls slowly, never to 0 at once", limits=(0, None),
    ),
    Panel(
        "gradient", "Gradient norm", "before clipping",
        (Line("train/grad_norm", "gradient norm"),), "no spikes", "log",
    ),
    Panel(
        "length", "Length of the answers", "tokens, mean",
        (Line("rollout/response_tokens_mean", "answer"),), "no drift to the limit", limits=(0, None),
    ),
)  # fmt: skip
_TRANSPORT = (
    Panel(
        "bytes", "Routing that moved", "bytes per step",
        (Line("transport/routing_bytes", "routing record"),), "follows the tokens", limits=(0, None),
    ),
    Panel(
        "bytes_per_token", "Size of a row", "bytes per token",
        (Line("transport/bytes_per_token", "routing record"),),
        "flat; below layers x top-k where groups share prompts", limits=(0, None),
    ),
    Panel(
        "transport_time", "Time to move it", "seconds per step",
        (
            Line("transport/put_s", "pack in the worker"),
            Line("transport/get_s", "wait of the slowest rank", "dashed"),
            Line("time/checks_s", "structural checks", "dotted"),
        ),
        "small beside the step", limits=(0, None),
    ),
)  # fmt: skip
_TIME = (
    Panel(
        "step_time", "Time of a step", "seconds",
        (
            Line("time/generate_s", "generate"),
            Line("time/train_s", "train"),
            Line("time/counterfactual_s", "pass without replay"),
            Line("time/weights_s", "weights"),
        ),
        "flat", limits=(0, None), stacked=True,
    ),
    Panel(
        "speed", "Tokens per second", "tokens/s",
        (
            Line("rollout/tokens_per_s", "generated"),
            Line("train/tokens_per_s", "trained", "dashed"),
        ),
        "flat", limits=(0, None),
    ),
    Panel(
        "replay_time", "Replay inside the passes", "seconds per step",
        (Line("train/replay_s", "replay"),), "a few per cent of training", limits=(0, None),
    ),
    Panel(
        "idle", "Trainer waits", "share of the step",
        (Line("time/idle_frac", "idle"),), "flat", limits=(0, 1),
    ),
)  # fmt: skip

SECTIONS = (
    Section("Log-prob difference", _DIFFERENCE, ("tokens/difference", "tokens/native_difference", "tokens/worst")),
    Section("Router", _ROUTER, ("layers/shadow_disagree", "layers/native_disagree")),
    Section("Reward", _REWARD),
    Section("Transport", _TRANSPORT),
    Section("Time", _TIME),
)
