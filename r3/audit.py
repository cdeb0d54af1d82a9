"""The replay audit: does the record fit what the trainer itself would have chosen, and if not, how does it fail to fit?

Structural checks cannot see a well-formed row of the wrong token, layer or request; agreement with the trainer's own
top-k can. On sampled rows of every step the record of position t is compared with the trainer's choice at t, and the
records of t-1 and t+1 with it as well (lags). numpy only; `r3.trainer` does the counting, this module the choice of
rows, the numbers and the alarm rules. The rules are those of docs/detection.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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

# The first four are those of this module, the others those of `r3.alarms`.
Rule = Literal["lag", "overlap", "layer", "window", "k3", "load", "dead", "drift"]
_PARTS = {
    "router/lag0_overlap": "all rows",
    "router/overlap_prompt": "prompt rows",
    "router/overlap_sampled": "rows of sampled tokens",
}


@dataclass(frozen=True, slots=True)
class Alarm:
    """One broken rule. `layer`: global index of an MoE layer; `window`: its first recorded row, counted over the step.

    `value` is what was found and `threshold` what it had to reach: of the audit an overlap in [0, 1], of the rules of
    `r3.alarms` the limit that it had to stay within.
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

    The overlap of a row and layer is |recorded & own top-k| / k, in [0, 1]; a mean is over rows, then layers.
    `lag0_overlap`: of the record as it stands, above 0.95 in a healthy run. `lag_margin`: that minus the better of the
    record shifted by -1 or +1 rows, in [-1, 1], positive. `overlap_prompt`, `overlap_sampled`: at lag 0 of one kind of
    rows. `overlap_window_min`: the lowest mean of a window; `overlap_window_row`: its first recorded row.
    `audited_rows`: how many were compared. Source: the checks of docs/detection.md; no peer logs them.

    The numbers of a layer are those of prompt or of sampled tokens, whichever overlap less: the rows of a prompt that
    many requests share fit the record of any of them, and outnumber the others.
    `layers`: global index of each MoE layer; `windows` `[n, 2]`: what `choose_windows` returned for the pass.
    """
    # All rows, those of the prompts, those of sampled tokens: [layers, lags, 3].
    sums, pairs = _with_all(counts.overlap), _with_all(counts.overlap_pairs)
    if not layers or not pairs[:, :, 0].all():
        return {}
    known = pairs.min((0, 1)) >= MIN_ROWS
    known[0] = True
    lags = (sums / np.maximum(pairs, 1))[:, :, known]
    margins = lags[:, 1] - np.maximum(lags[:, 0], lags[:, 2])
    here = lags[:, 1]
    before, now, after = sums[:, :, 0].sum(0) / pairs[:, :, 0].sum(0)
    hits, rows = counts.windows[: len(windows)].T
    means = np.where(rows > 0, hits / np.maximum(rows, 1), np.inf)
    lowest = int(np.argmin(means))
    report = {
        "router/lag0_overlap": float(now),
        "router/lag_margin": float(now - max(before, after)),
        "router/overlap_window_min": float(means[lowest]),
        "router/overlap_window_row": float(windows[lowest, 0]),
        "router/audited_rows": float(pairs[:, 1, 0].max()),
    }
    names = [key for key, is_known in zip(_PARTS, known, strict=True) if is_known]
    report |= {key: float(here[:, part].mean()) for part, key in enumerate(names) if part}
    worst = here.argmin(1)
    for column, layer in enumerate(layers):
        report[f"router/overlap_layer/{layer}"] = float(here[column, worst[column]])
        report[f"router/lag_margin_layer/{layer}"] = float(margins[column, worst[column]])
    return report


def _with_all(parts: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([parts.sum(2, keepdims=True), parts], 2)


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
    found: list[Alarm] = []
    if _is_shifted(here, margin, min_overlap):
        found.append(_lag(here, margin, "the record fits"))
    else:
        for layer, by in _per_layer(report, "router/lag_margin_layer/").items():
            if _is_shifted(layers[layer], by, min_overlap):
                found.append(_lag(layers[layer], by, f"the record of layer {layer} fits", layer))
    low = _low_layers(layers, min_overlap)
    if 2 * len(low) > len(layers):
        found.append(_low_record(report, float(np.median(list(layers.values()))), min_overlap))
    else:
        found += low
    return (*found, *_low_window(report, here, where))


def _is_shifted(value: float, margin: float, min_overlap: float) -> bool:
    """Tell whether a neighbour fits better, and well: rows that fit nowhere are no shift."""
    return margin < -LAG_SLACK and value - margin >= min_overlap


def _low_record(report: Mapping[str, float], value: float, threshold: float) -> Alarm:
    parts = [f"{report[key]:.3f} over {what}" for key, what in _PARTS.items() if key in report]
    return Alarm(
        "overlap", value, threshold,
        f"the record overlaps the trainer's own top-k by {', '.join(parts)}; {threshold:g} is required "
        "(routing.min_overlap): rows of other requests, layers in another order, physical expert ids, or another model",
    )  # fmt: skip


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
