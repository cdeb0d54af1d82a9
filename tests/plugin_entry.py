"""Make this package's SGLang plugin visible where the installed metadata are older than its entry point."""

from __future__ import annotations

import os
import sys
import tempfile
from importlib.metadata import entry_points
from pathlib import Path

from r3.rollout.sglang_plugin.client import GROUP, NAME

ONLY_PLATFORM = "r3_cpu"


def show() -> None:
    """Register the entry point for this process and those that it spawns, unless it is registered."""
    os.environ.pop("SGLANG_PLUGINS", None)
    added = folder()
    if added:
        # A spawned process takes sys.path over from its parent.
        sys.path.append(added)


def folder() -> str:
    """Return a folder whose place on the path registers the entry point, an empty string where it is registered."""
    if [entry for entry in entry_points(group=GROUP) if entry.name == NAME]:
        return ""
    made = Path(tempfile.mkdtemp()) / "r3_test_plugin-0.dist-info"
    made.mkdir()
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: r3-test-plugin\nVersion: 0\n")
    (made / "entry_points.txt").write_text(f"[{GROUP}]\n{NAME} = r3.rollout.sglang_plugin.plugin:register\n")
    return str(made.parent)


def hide() -> None:
    """Let SGLang load its platform alone, as if the plugin were not installed."""
    os.environ["SGLANG_PLUGINS"] = ONLY_PLATFORM
