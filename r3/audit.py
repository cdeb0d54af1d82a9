"""The replay audit: does the record fit what the trainer itself would have chosen, and if not, how does it fail to fit?

Structural checks cannot see a well-formed row of the wrong token, layer or request; agreement with the trainer's own
top-k can. On sampled rows of every step the record of position t is compared with the trainer's choice at t, and the
records of t-1 and t+1 with it as well (lags). numpy only; `r3.trainer` does the counting, this module the choice of
rows, the numbers and the alarm rules. The rules are those of docs/detection.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from r3.errors import RoutingError
from r3.metrics import AUDIT_WINDOWS, RouterCounts

LAGS = (-1, 0, 1)
# A window has at least this many rows, so that its mean says something.
WINDOW_ROWS = 256
# With fewer audited rows no rule is applied: a handful of near-ties could break any of them.
MIN_ROWS = 32
# A router that sends every token the same way fits every lag alike, up to this much noise.
LAG_SLACK = 0.05

Rule = Literal["lag", "overlap", "layer", "window"]


@dataclass(frozen=True, slots=True)
class Alarm:
    """One broken rule. `layer`: global index of an MoE layer; `window`: its first recorded row, counted over the step.

    `value` is the overlap that was found and `threshold` the one that it had to reach, both in [0, 1].
    """

    rule: Rule
    value: float
    threshold: float
    sentence: str
    layer: int | None = None
    window: int | None = None


class AuditError(RoutingError):
    """A record that breaks a rule of the audit; `alarms` says which."""

    def __init__(self, where: str, alarms: tuple[Alarm, ...]) -> None:
        # Both go into `args`, so that the error survives the way out of an actor.
        super().__init__(where, alarms)
        self.where, self.alarms = where, alarms

    def __str__(self) -> str:
        return f"{self.where}: {'; '.join(alarm.sentence for alarm in self.alarms)}"


def choose_windows(rows: int, turn: int) -> NDArray[np.int64]:
    """Return the windows `[n, 2]` (begin, end) of a step's `rows` recorded rows that are audited in this `turn`.

    The rows are cut into windows of equal size, at least `WINDOW_ROWS` (one window where there are fewer), of which at
    most `AUDIT_WINDOWS`, evenly spread, are taken; another `turn` takes others. Alike on every rank.
    """
    if not rows:
        return np.empty((0, 2), np.int64)
    count = max(1, rows // WINDOW_ROWS)
    bounds = np.arange(count + 1, dtype=np.int64) * rows // count
    if count <= AUDIT_WINDOWS:
        chosen = np.arange(count)
    else:
        chosen = np.sort((np.arange(AUDIT_WINDOWS) * count // AUDIT_WINDOWS + turn) % count)
    return np.stack([bounds[chosen], bounds[chosen + 1]], axis=1)


def overlap_metrics(counts: RouterCounts, layers: Sequence[int], windows: NDArray[np.int64]) -> dict[str, float]:
    """Return the `router/*` overlaps of one audited pass, empty where nothing was compared.

    `layers`: global index of each MoE layer; `windows` `[n, 2]`: what `choose_windows` returned for the pass.
    """
    if not counts.overlap_pairs.all():
        return {}
    lags = counts.overlap / counts.overlap_pairs
    before, here, after = counts.overlap.sum(0) / counts.overlap_pairs.sum(0)
    hits, pairs = counts.windows[: len(windows)].T
    means = hits / np.maximum(pairs, 1)
    lowest = int(np.argmin(np.where(pairs > 0, means, np.inf)))
    report = {
        "router/lag0_overlap": float(here),
        "router/lag_margin": float(here - max(before, after)),
        "router/overlap_window_min": float(means[lowest]),
        "router/overlap_window_row": float(windows[lowest, 0]),
        "router/audited_rows": float(counts.overlap_pairs[:, LAGS.index(0)].max()),
    }
    for layer, (back, same, ahead) in zip(layers, lags, strict=True):
        report[f"router/overlap_layer/{layer}"] = float(same)
        report[f"router/lag_margin_layer/{layer}"] = float(same - max(back, ahead))
    return report


def find_alarms(
    report: Mapping[str, float], min_overlap: float, where: Callable[[int], str] = lambda row: f"recorded row {row}"
) -> tuple[Alarm, ...]:
    """Apply the alarm rules to the overlaps of one pass (`overlap_metrics`); none without them, or of too few rows.

    `min_overlap`: what the whole and every layer must reach, 0 to leave that to the relative rules; `where` names what
    a recorded row belongs to. A rule that the whole record breaks is not repeated for its layers.
    """
    if report.get("router/audited_rows", 0) < MIN_ROWS:
        return ()
    here, margin = report["router/lag0_overlap"], report["router/lag_margin"]
    layers = _per_layer(report, "router/overlap_layer/")
    margins = _per_layer(report, "router/lag_margin_layer/")
    found: list[Alarm] = []
    if margin < -LAG_SLACK:
        found.append(_lag(here, margin, "the record fits"))
    else:
        found += [
            _lag(layers[layer], value, f"the record of layer {layer} fits", layer)
            for layer, value in margins.items()
            if value < -LAG_SLACK
        ]
    low = _low_layers(layers, min_overlap)
    if here < min_overlap and 2 * len(low) > len(layers):
        found.append(
            Alarm(
                "overlap", here, min_overlap,
                f"the record overlaps the trainer's own top-k by {here:.3f} only, {min_overlap:g} is required "
                "(routing.min_overlap): rows of other requests, layers in another order, physical expert ids, or "
                "another model",
            )
        )  # fmt: skip
    else:
        found += low
    return (*found, *_low_window(report, here, where))


def _lag(value: float, margin: float, subject: str, layer: int | None = None) -> Alarm:
    best = value - margin
    text = f"{subject} better shifted by one token: overlap with the trainer's own top-k is {value:.3f} as it stands"
    return Alarm("lag", value, best, f"{text}, {best:.3f} at lag -1 or +1", layer=layer)


def _low_layers(layers: Mapping[int, float], min_overlap: float) -> list[Alarm]:
    median = float(np.median(list(layers.values())))
    threshold = max(median / 2, min_overlap)
    return [
        Alarm(
            "layer", value, threshold,
            f"layer {layer} overlaps the trainer's own top-k by {value:.3f}, the median layer by {median:.3f}: its "
            "rows were overwritten, never written, or are those of another layer",
            layer=layer,
        )
        for layer, value in layers.items()
        if value < threshold
    ]  # fmt: skip


def _low_window(report: Mapping[str, float], here: float, where: Callable[[int], str]) -> list[Alarm]:
    value, first = report["router/overlap_window_min"], int(report["router/overlap_window_row"])
    if value >= here / 2:
        return []
    text = (
        f"at least {WINDOW_ROWS} rows from {where(first)} on overlap the trainer's own top-k by {value:.3f}, all "
        f"audited rows by {here:.3f}: stale rows, or rows of another request"
    )
    return [Alarm("window", value, here / 2, text, window=first)]


def _per_layer(report: Mapping[str, float], prefix: str) -> dict[int, float]:
    return {int(key.removeprefix(prefix)): value for key, value in report.items() if key.startswith(prefix)}
