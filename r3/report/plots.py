"""The plots of a report, drawn into matplotlib axes; light and dark are a matter of the page that shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from r3.charts import LAYERS, layer_values
from r3.panels import Line, Panel
from r3.report.read import Floats, Group, Run
from r3.tokens import EDGES, TAIL, TokenReport

# Okabe-Ito: distinguishable with every common colour vision.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
INK, ALARM = "#1f2328", "#d55e01"
_DASHES = {"solid": "-", "dashed": "--", "dotted": ":"}
_RATIOS = (1.2, 1.5, 2.0)
# Shares below this are drawn on a linear axis, so that 0 has a place.
_SMALLEST_SHARE = 1e-5
# A heat map is dark as long as nothing exceeds a fraction of this; large models differ natively by about as much.
_BRIGHT = 0.1
# With fewer points than this a series is drawn with markers.
_SPARSE = 25

Draw = Callable[[Any, Sequence[Group]], bool]


def draw_panel(panel: Panel, axes: Any, groups: Sequence[Group]) -> bool:
    """Draw the metrics of a panel over steps; tell whether there was anything to draw."""
    if panel.stacked and len(groups) == len(groups[0].runs) == 1:
        drawn = _stack(panel, axes, groups[0].runs[0])
    else:
        drawn = _lines(panel, axes, groups)
    if not drawn:
        return False
    if panel.scale == "log":
        axes.set_yscale("log")
    elif panel.scale == "share":
        axes.set_yscale("symlog", linthresh=_SMALLEST_SHARE, linscale=0.5)
        axes.set_ylim(bottom=-_SMALLEST_SHARE / 3)
    _limit(panel, axes)
    axes.set(xlabel="step", ylabel=panel.unit)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _mark_alarms(axes, groups)
    roomy = panel.limits[1] is None and panel.scale != "share"
    if roomy:
        _make_room(axes)
    _legend(axes, "upper right" if roomy else "best")
    return True


def _limit(panel: Panel, axes: Any) -> None:
    """Set the fixed ends of the y axis; above a fixed 0 the values keep some air."""
    bottom, top = panel.limits
    if panel.scale == "share":
        return
    if bottom == 0 and top is None:
        top = 1.12 * float(axes.dataLim.ymax) or 1.0
    axes.set_ylim(bottom, top)


def _make_room(axes: Any) -> None:
    """Raise the upper end of the y axis by the height of the legend."""
    names = len(axes.get_legend_handles_labels()[0])
    if names < 2:
        return
    transform, (bottom, top) = axes.yaxis.get_transform(), axes.get_ylim()
    low, high = transform.transform([bottom, top])
    axes.set_ylim(bottom, transform.inverted().transform([high + (high - low) * 0.09 * names])[0])


def _lines(panel: Panel, axes: Any, groups: Sequence[Group]) -> bool:
    drawn = False
    lines = (Line("time/step_s", "whole step"),) if panel.stacked else panel.lines
    for g, group in enumerate(groups):
        for number, line in enumerate(lines):
            steps, values = group.band(line.key, panel.smooth)
            if not values.size:
                continue
            drawn = True
            color = COLORS[(g if len(groups) > 1 else number) % len(COLORS)]
            label = line.label if len(groups) == 1 else group.label
            if len(groups) > 1 and len(lines) > 1:
                label = f"{group.label}: {line.label}"
            _band(axes, steps, values, color, line, label)
            if panel.smooth > 1 and values.shape[1] < group.band(line.key)[1].shape[1]:
                for run in group.runs:
                    axes.plot(*run.series(line.key), color=color, alpha=0.25, linewidth=0.8)
    return drawn


def _band(axes: Any, steps: Floats, values: Floats, color: str, line: Line, label: str) -> None:
    """Draw the mean of all runs, and from the smallest to the largest value a band."""
    marker = "o" if len(steps) < _SPARSE else ""
    style: dict[str, Any] = {"color": color, "linestyle": _DASHES[line.dash], "marker": marker, "markersize": 3.5}
    axes.plot(steps, values.mean(0), linewidth=1.8, label=label, **style)
    if len(values) > 1:
        axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.18, linewidth=0)


def _stack(panel: Panel, axes: Any, run: Run) -> bool:
    keys = [line for line in panel.lines if len(run.series(line.key)[0])]
    steps = sorted({row["step"] for row in run.rows})
    if not keys or not steps:
        return False
    parts = []
    for line in keys:
        found = dict(zip(*run.series(line.key), strict=True))
        parts.append([found.get(step, 0.0) for step in steps])
    axes.stackplot(
        steps, *parts, labels=[line.label for line in keys], colors=COLORS[: len(keys)], alpha=0.75, linewidth=0
    )
    return True


def draw_tail(axes: Any, groups: Sequence[Group]) -> bool:
    """Draw the share of tokens whose |d| exceeds a value, over all steps that looked at single tokens."""
    drawn = False
    for g, group in enumerate(groups):
        reports = [report for run in group.runs for report in run.tokens]
        both = [report for report in reports if report.native_difference is not None]
        for number, (found, native, name) in enumerate(
            ((reports, False, "as trained"), (both, True, "same batch, no replay"))
        ):
            if not found:
                continue
            drawn = True
            color = COLORS[(g if len(groups) > 1 else number) % len(COLORS)]
            label = name if len(groups) == 1 else f"{group.label}: {name}"
            style = "--" if native else "-"
            axes.plot(TAIL, _tail(found, native), style, color=color, linewidth=1.8, label=label)
    if not drawn:
        return False
    axes.set(xscale="log", yscale="log", xlabel="|d| [nats]", ylabel="share of tokens beyond")
    axes.set_xlim(1e-3, max(3.0, axes.get_xlim()[1]) if _reaches(groups, 1.0) else 1.0)
    for ratio in _RATIOS:
        axes.axvline(np.log(ratio), color=INK, linewidth=0.8, linestyle=":", alpha=0.6)
        axes.text(np.log(ratio), 1.0, f" {ratio:g}x", fontsize=8, rotation=90, va="top", ha="right", color=INK)
    _legend(axes, loc="lower left")
    return True


def _tail(reports: Sequence[TokenReport], native: bool) -> Floats:
    found = [report.native_difference if native else report.difference for report in reports]
    above = np.sum([one.above for one in found if one is not None], axis=0)
    return np.where(above > 0, above / sum(report.total for report in reports), np.nan)


def _reaches(groups: Sequence[Group], value: float) -> bool:
    index = int(np.searchsorted(TAIL, value))
    return any(report.difference.above[index] for group in groups for run in group.runs for report in run.tokens)


def draw_histogram(axes: Any, groups: Sequence[Group]) -> bool:
    """Draw the histogram of d over all steps that looked at single tokens."""
    drawn, reach = False, 0.05
    for g, group in enumerate(groups):
        reports = [report for run in group.runs for report in run.tokens]
        if not reports:
            continue
        drawn = True
        counts = np.sum([report.difference.counts for report in reports], axis=0)
        native = [one.native_difference.counts for one in reports if one.native_difference is not None]
        several = len(groups) > 1
        _stairs(axes, counts, COLORS[g], f"{group.label}: as trained" if several else "as trained", "-")
        used = EDGES[:-1][counts > 0]
        if native:
            summed = np.sum(native, axis=0)
            used = np.append(used, EDGES[:-1][summed > 0])
            name = f"{group.label}: no replay" if several else "same batch, no replay"
            _stairs(axes, summed, COLORS[g] if several else COLORS[1], name, "--")
        reach = max(reach, float(np.abs(used).max()) + EDGES[1] - EDGES[0])
    if not drawn:
        return False
    axes.set(yscale="log", xlabel="d = log p(trainer) - log p(engine) [nats]", ylabel="share of tokens in a bin")
    axes.set_xlim(-min(reach, 1.0), min(reach, 1.0))
    _legend(axes)
    return True


def _stairs(axes: Any, counts: Floats, color: str, label: str, style: str) -> None:
    shares = np.where(counts > 0, counts / counts.sum(), np.nan)
    axes.stairs(shares, EDGES, color=color, label=label, linestyle=style, linewidth=1.8, baseline=None)


def draw_heat_map(key: str, axes: Any, run: Run) -> bool:
    """Draw layer x step of a disagreement (`r3.charts.LAYERS`); tell whether there was anything to draw."""
    found = [(row["step"], layer_values(row, LAYERS[key])) for row in run.rows]
    found = [(step, shares) for step, shares in found if shares]
    if not found:
        return False
    steps, layers = [step for step, _ in found], list(found[0][1])
    values = np.array([[shares.get(layer, np.nan) for layer in layers] for _, shares in found]).T
    vmax = max(_BRIGHT, float(np.nanmax(values)))
    mesh = axes.pcolormesh(_edges(steps), _edges(layers), values, cmap="cividis", rasterized=True, vmin=0, vmax=vmax)
    bar = axes.figure.colorbar(mesh, ax=axes)
    bar.set_label("share of tokens")
    axes.set(xlabel="step", ylabel="layer")
    axes.grid(visible=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return True


def _edges(centres: Sequence[float]) -> Floats:
    middle = (np.array(centres[1:]) + np.array(centres[:-1])) / 2
    return np.concatenate([[centres[0] - 0.5], middle, [centres[-1] + 0.5]])


def _mark_alarms(axes: Any, groups: Sequence[Group]) -> None:
    """Shade the steps with an alarm, where a single run is drawn."""
    if len(groups) > 1 or len(groups[0].runs) > 1:
        return
    steps = sorted({alarm["step"] for alarm in groups[0].runs[0].alarms() if alarm.get("step", 0) > 0})
    for number, step in enumerate(steps):
        label = "alarm" if number == 0 else None
        axes.axvspan(step - 0.5, step + 0.5, color=ALARM, alpha=0.13, linewidth=0, label=label, zorder=0)


def _legend(axes: Any, loc: str = "best") -> None:
    """Name the lines, unless there is one and the title says what it is."""
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, fontsize=8, loc=loc, handlelength=3)
