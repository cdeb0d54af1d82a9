"""What W&B is told about a run: how each metric is summarised, and the tables and histograms of a step.

Everything is logged through the run's history, so an offline run that is synced later shows the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from r3.tokens import EDGES, Difference, TokenReport, WorstTokens

# The first part of every key (docs/metrics.md) and what W&B's run table keeps of it.
SUMMARIES = {
    "mismatch": "min,max,last",
    "mismatch_native": "min,max,last",
    "mismatch_r2": "min,max,last",
    "router": "min,max,last",
    "rollout": "min,max,last",
    "eval": "min,max,last",
    "train": "min,max,last",
    "transport": "min,max,last",
    "time": "min,max,last",
}
WORST, DIFFERENCE, NATIVE_DIFFERENCE = "tokens/worst", "tokens/difference", "tokens/native_difference"
# Keys of the layer x step heat maps, and the metric that each is made of.
LAYERS = {
    "layers/shadow_disagree": "router/shadow_disagree_layer/",
    "layers/native_disagree": "router/native_disagree_layer/",
}
COLUMNS = (
    "step", "group", "member", "position", "before", "token", "after", "rollout log-prob", "trainer log-prob",
    "difference [nats]", "without replay", "layers that disagree", "without replay, layers",
)  # fmt: skip


def define(run: Any) -> None:
    """Give every metric the step as its axis, and the summaries that the run table shows."""
    run.define_metric("step", hidden=True)
    for group, summary in SUMMARIES.items():
        run.define_metric(f"{group}/*", step_metric="step", summary=summary)
    for group in ("tokens", "layers"):
        run.define_metric(f"{group}/*", step_metric="step")


def of_step(metrics: Mapping[str, float], tokens: TokenReport | None) -> dict[str, Any]:
    """Return the step's histograms and, where it looked at single tokens, its table, as W&B's own types.

    A histogram panel draws steps on one axis and bins on the other: with MoE layers as bins it is the heat map.
    """
    import wandb

    found: dict[str, Any] = {}
    for key, prefix in LAYERS.items():
        shares = layer_values(metrics, prefix)
        if shares:
            edges = [layer - 0.5 for layer in shares] + [max(shares) + 0.5]
            found[key] = wandb.Histogram(np_histogram=(np.array(list(shares.values())), np.array(edges)))
    if tokens is not None:
        found[WORST] = wandb.Table(columns=list(COLUMNS), data=list(table_rows(tokens)))
        found[DIFFERENCE] = _histogram(tokens.difference)
        if tokens.native_difference is not None:
            found[NATIVE_DIFFERENCE] = _histogram(tokens.native_difference)
    return found


def layer_values(metrics: Mapping[str, float], prefix: str) -> dict[int, float]:
    """Return `layer: value` of a per-layer metric, ascending."""
    found = {int(key.removeprefix(prefix)): value for key, value in metrics.items() if key.startswith(prefix)}
    return dict(sorted(found.items()))


def table_rows(report: TokenReport) -> Iterator[list[Any]]:
    """Yield one row under `COLUMNS` for each worst token."""
    worst: WorstTokens = report.worst
    tokens = worst.tokens
    for i in range(len(worst)):
        native, layers = tokens.native, tokens.native_layers
        yield [
            report.step,
            worst.groups[i],
            worst.members[i],
            worst.positions[i],
            worst.before[i],
            tokens.texts[i],
            worst.after[i],
            tokens.rollout[i],
            tokens.train[i],
            tokens.train[i] - tokens.rollout[i],
            None if native is None else native[i] - tokens.rollout[i],
            _listed(tokens.layers[i]),
            None if layers is None else _listed(layers[i]),
        ]


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))


def _histogram(found: Difference) -> Any:
    import wandb

    return wandb.Histogram(np_histogram=(np.array(found.counts), EDGES))
