"""Make or update the saved W&B workspace of a project: `python -m r3.dashboard [--project NAME] [--dry-run]`.

The panels are those of `r3.panels`. The workspace has a name of its own in the project, so a second call updates what
the first one made, and other views stay as they are. Needs no run; without `--dry-run` it needs a W&B account.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from r3.config import TrackingConfig
from r3.errors import ConfigError, R3Error
from r3.panels import SECTIONS, Panel, Section

TITLE = "R3"
INSTALL = "pip install 'rollout-router-replay[dashboard]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Save the workspace and print its address, or print the panels; return 0, or 2 where W&B will not have it."""
    options = _parser().parse_args(arguments)
    if options.dry_run:
        print(json.dumps(specification(options.title), indent=1))
        return 0
    try:
        print(save(options.entity, options.project, options.title))
    except R3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def specification(title: str = TITLE) -> dict[str, Any]:
    """Return everything that the workspace shows, as plain values."""
    return {"workspace": title, "x_axis": "step", "sections": [asdict(section) for section in SECTIONS]}


def save(entity: str | None, project: str, title: str) -> str:
    """Make the workspace, or give the one that is there the panels of today; return its address.

    Raises `ConfigError` where wandb-workspaces is missing, nobody is logged in or the project is not there.
    """
    try:
        import wandb
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise ConfigError(f"r3.dashboard needs wandb and wandb-workspaces: {INSTALL}") from None
    try:
        entity = entity or wandb.Api().default_entity
        workspace = _open(ws, entity, project, title)
        workspace.sections = [_section(section) for section in SECTIONS]
        workspace.save()
        return str(workspace.url)
    except Exception as error:
        raise ConfigError(
            f"W&B did not save workspace {title!r} of project {entity}/{project}: {error}; log in with `wandb login`, "
            "log one run to the project, or print the panels with --dry-run"
        ) from error


def _open(ws: Any, entity: str, project: str, title: str) -> Any:
    """Return the workspace that an earlier call saved, else a new one under the same internal name."""
    name = view_name(entity, project, title)
    try:
        return ws.Workspace.from_url(f"https://wandb.ai/{entity}/{project}?nw={name}")
    except ValueError as error:
        # The library tells by the text alone whether the view or the project is missing.
        if "not found in project" not in str(error):
            raise
    workspace = ws.Workspace(entity=entity, project=project, name=title)
    # The name in W&B's table of views; the library would make up a random one, which no later call could find.
    workspace._internal_name = f"nw-{name}-v"
    return workspace


def view_name(entity: str, project: str, title: str) -> str:
    """Return the name of the view, the same for every call: 11 letters and digits, as W&B's own."""
    return "r3" + hashlib.sha256(f"{entity}/{project}/{title}".encode()).hexdigest()[:9]


def _section(section: Section) -> Any:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    panels: list[Any] = [_panel(panel) for panel in section.panels]
    panels += [wr.MediaBrowser(title=key, media_keys=[key], num_columns=1) for key in section.media]
    return ws.Section(name=section.name, panels=panels, is_open=True)


def _panel(panel: Panel) -> Any:
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(
        title=panel.title,
        x="step",
        y=[line.key for line in panel.lines],
        log_y=panel.scale == "log",
        range_y=panel.limits,
        title_x="step",
        title_y=panel.unit,
        plot_type="stacked-area" if panel.stacked else "line",
    )


def _parser() -> argparse.ArgumentParser:
    defaults = TrackingConfig()
    parser = argparse.ArgumentParser(
        prog="r3.dashboard",
        description="Make or update the saved W&B workspace with the panels of R3.",
        epilog="exit codes: 0 saved (or printed), 2 usage, or W&B did not save it",
    )
    parser.add_argument("--project", default=defaults.project, help="W&B project (default %(default)s)")
    parser.add_argument("--entity", default=defaults.entity, help="W&B entity (default: that of the account)")
    parser.add_argument("--title", default=TITLE, help="name of the workspace (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the panels as JSON; needs neither W&B nor a run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
