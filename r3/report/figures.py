"""From plots to pictures: an inline SVG for each plot of the page, a PNG for each section."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from r3.errors import ConfigError
from r3.panels import SECTIONS, Section
from r3.report.plots import (
    ALARM,
    COLORS,
    INK,
    Draw,
    draw_heat_map,
    draw_histogram,
    draw_panel,
    draw_tail,
)
from r3.report.read import Group

_SIZE = (5.4, 3.2)
_HEAT_MAPS = {
    "layers/shadow_disagree": ("shadow", "Layers that disagree inside the replayed pass"),
    "layers/native_disagree": ("native", "Layers that disagree without replay"),
}
# What a README shows.
OVERVIEW = ("k3", "tail", "overlap", "reward")
# More groups than this get no heat map of their own.
_MOST_MAPS = 4


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot: `name` is unique in the report, `hint` says what is healthy."""

    name: str
    title: str
    hint: str
    draw: Draw


@dataclass(frozen=True, slots=True)
class Picture:
    """A plot that has something to show, as an SVG element that takes its colours from the page."""

    name: str
    title: str
    hint: str
    svg: str


def plots_of(section: Section, groups: Sequence[Group]) -> Iterator[Plot]:
    """Yield the plots of a section: its panels, and what is drawn from more than one number a step."""
    for panel in section.panels:
        yield Plot(panel.name, panel.title, panel.hint, partial(draw_panel, panel))
    if "tokens/difference" in section.media:
        hint = "the solid line falls off earlier than the dashed one"
        yield Plot("tail", "How far the differences reach", hint, draw_tail)
        yield Plot("histogram", "Histogram of the difference", "narrow and symmetric", draw_histogram)
    for key in section.media:
        if key not in _HEAT_MAPS:
            continue
        name, title = _HEAT_MAPS[key]
        for g, group in enumerate(groups[:_MOST_MAPS]):
            run = group.runs[0]
            which = f", {group.label}" if len(groups) > 1 else ""
            plot = partial(_one_map, key, run)
            yield Plot(f"{name}_layers_{g}", f"{title}{which}", "no layer stands out; grows a little with depth", plot)


def pictures(section: Section, groups: Sequence[Group]) -> list[Picture]:
    """Draw the plots of a section that have data."""
    found = []
    for plot in plots_of(section, groups):
        figure = _figure(_SIZE)
        with _style():
            if not plot.draw(_axes(figure.subplots()), groups):
                continue
            found.append(Picture(plot.name, plot.title, plot.hint, _svg(figure, plot)))
    return found


def write_pngs(groups: Sequence[Group], folder: Path, sheets: Mapping[str, Sequence[str]] | None = None) -> list[Path]:
    """Write PNGs of the plots that have data and return their paths.

    `sheets`: names of plots for each file; by default an overview and one for each section.
    """
    folder.mkdir(parents=True, exist_ok=True)
    by_section = {section.name: list(plots_of(section, groups)) for section in SECTIONS}
    every = {plot.name: plot for plots in by_section.values() for plot in plots}
    sheets = sheets or {"overview": OVERVIEW} | {
        name.lower().replace(" ", "_"): [plot.name for plot in plots] for name, plots in by_section.items()
    }
    drawn = [_sheet([every[plot] for plot in plots], groups, folder / f"{name}.png") for name, plots in sheets.items()]
    return [path for path in drawn if path]


def _sheet(plots: Sequence[Plot], groups: Sequence[Group], path: Path) -> Path | None:
    """Draw plots two in a row; those without data leave no hole."""
    full = [plot for plot in plots if plot.draw(_figure(_SIZE).subplots(), groups)]
    if not full:
        return None
    rows = -(-len(full) // 2)
    with _style():
        figure = _figure((2 * _SIZE[0], _SIZE[1] * rows))
        cells = list(figure.subplots(rows, 2, squeeze=False).flat)
        for axes, plot in zip(cells, full, strict=False):
            plot.draw(_axes(axes), groups)
            axes.set_title(plot.title, fontsize=10, loc="left")
        for axes in cells[len(full) :]:
            axes.set_axis_off()
        _write_small(figure, path)
    return path


def _write_small(figure: Any, path: Path) -> None:
    """Write a PNG of 256 colours: a third of the size, and enough for lines, bands and one colour map."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=80, facecolor="white")
    Image.open(drawn).convert("RGB").quantize(256).save(path, optimize=True)


def _one_map(key: str, run: Any, axes: Any, groups: Sequence[Group]) -> bool:
    return draw_heat_map(key, axes, run)


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("r3.report draws with matplotlib: pip install 'rollout-router-replay[plot]'") from None
    return Figure(figsize=size, layout="constrained")


def _style() -> Any:
    from matplotlib import rc_context

    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    return rc_context(
        dict.fromkeys(ink, INK)
        # Text stays text: it can be searched and read aloud.
        | {"svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    )


def _axes(axes: Any) -> Any:
    axes.grid(alpha=0.1, linewidth=0.8)
    axes.set_facecolor("none")
    return axes


def _svg(figure: Any, plot: Plot) -> str:
    from matplotlib import rc_context

    text = io.StringIO()
    # Ids of clip paths are hashes of their content: without a salt of its own two plots of a page could share one.
    with rc_context({"svg.hashsalt": plot.name}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, dpi=110, metadata=metadata)
    svg = text.getvalue()
    svg = re.sub(
        r' width="[\d.]+pt" height="[\d.]+pt"',
        f' role="img" aria-label="{plot.title}"',
        svg[svg.index("<svg") :],
        count=1,
    )
    for number, color in enumerate(COLORS):
        svg = svg.replace(color, f"var(--s{number})")
    return svg.replace(INK, "currentColor").replace(ALARM, "var(--alarm)")
