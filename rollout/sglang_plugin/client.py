"""The engine process's side of the plugin: is it there, does it stamp, how do rows come back; switch it on or off."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from typing import Any, Literal

from r3.errors import ConfigError
from r3.rollout.segment import Owner
from r3.routing import Provenance

NAME = "r3_provenance"
RETURNS = "r3_returns"
GROUP = "sglang.srt.plugins"
Wanted = Literal["auto", "require", "off"]


def switch(engine: Any, wanted: Wanted) -> tuple[Provenance, str]:
    """Switch stamping of an in-process SGLang engine; return what its records will say, and why when it is `unknown`.

    Raises `ConfigError` when `routing.provenance` is `require` and the engine does not stamp.
    """
    reason = absent()
    if reason is None:
        try:
            engine.collective_rpc(NAME, enabled=wanted != "off")
        except (AssertionError, AttributeError, RuntimeError) as error:
            # An engine whose plugin refuses, or never ran, answers with the reason.
            reason = f"the plugin {NAME} does not stamp: {error}"
    if wanted == "off":
        return "unknown", "routing.provenance is off"
    if reason is None:
        return "exact", ""
    if wanted == "require":
        raise ConfigError(f"routing.provenance is require, but {reason}")
    return "unknown", reason


def open_returns(engine: Any, wanted: Wanted, size: int, *, prefault: bool) -> tuple[Owner | None, str]:
    """Let an in-process SGLang engine return rows through a new segment of `size` bytes.

    Returns None and the reason where it goes on to send them as SGLang does. Raises `ConfigError` when
    `routing.shared_memory` is `require` and that is so.
    """
    owner: Owner | None = None
    reason = "routing.shared_memory is off" if wanted == "off" else absent()
    if reason is None:
        try:
            owner = Owner(size, prefault=prefault)
            engine.collective_rpc(RETURNS, path=owner.path)
            return owner, ""
        except OSError as error:
            reason = f"no shared memory of {size >> 20} MiB (routing.shared_mib): {error}"
        except (AssertionError, AttributeError, RuntimeError) as error:
            reason = f"the plugin {NAME} does not return rows through shared memory: {error}"
    if owner is not None:
        owner.close()
    if wanted == "require":
        raise ConfigError(f"routing.shared_memory is require, but {reason}")
    return None, reason


def absent() -> str | None:
    """Return why SGLang's processes will not load the plugin, None when they will."""
    if not [entry for entry in entry_points(group=GROUP) if entry.name == NAME]:
        return f"the SGLang plugin {NAME} is not registered; install this package (pip install --no-deps -e .)"
    allowed = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    if allowed and NAME not in allowed:
        return f"SGLANG_PLUGINS={os.environ['SGLANG_PLUGINS']} leaves the plugin {NAME} out; add it"
    return None
