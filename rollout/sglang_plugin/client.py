"""The engine process's side of the plugin: is it there, does it stamp, how do rows come back; switch it on or off."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any, Literal

from r3.errors import ConfigError, EngineError
from r3.rollout.segment import Owner
from r3.rollout.sglang_plugin.weights import CHANGED
from r3.routing import Provenance
from r3.types import WeightVersion

NAME = "r3_provenance"
RETURNS = "r3_returns"
WEIGHTS = "r3_weights"
ONE_COPY = "r3_one_copy"
# What an engine says of its copies before it has made a pass.
NOT_COMPARED = "no pass was compared with SGLang's own copies yet"
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


def copies(engine: Any) -> str:
    """Return how the ids of a pass come to SGLang's buffer, in words; empty where no pass has shown it yet."""
    if absent() is not None:
        return ""
    try:
        engine.collective_rpc(ONE_COPY)
    except (AssertionError, AttributeError, RuntimeError) as error:
        return "" if NOT_COMPARED in str(error) else f"ids of every layer are copied on their own ({error})"
    return "ids of all layers are copied at once"


def absent() -> str | None:
    """Return why SGLang's processes will not load the plugin, None when they will."""
    if not [entry for entry in entry_points(group=GROUP) if entry.name == NAME]:
        return f"the SGLang plugin {NAME} is not registered; install this package (pip install --no-deps -e .)"
    allowed = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    if allowed and NAME not in allowed:
        return f"SGLANG_PLUGINS={os.environ['SGLANG_PLUGINS']} leaves the plugin {NAME} out; add it"
    return None


class Verifier:
    """Compares the weights that an in-process SGLang engine received with what was sent, where its plugin can.

    `absent`: why it does not; empty when it does.
    """

    def __init__(self, engine: Any, *, wanted: bool) -> None:
        self._engine = engine
        self.absent = ("" if wanted else "weights.verify is false") or absent() or ""
        if not self.absent:
            try:
                self.start()
            except EngineError as error:
                self.absent = str(error)

    def start(self) -> None:
        """Begin to note what arrives."""
        if not self.absent:
            self._call()

    def compare(self, sent: Sequence[int], version: WeightVersion, engine: str) -> None:
        """Raise `EngineError` that names bucket and version unless what arrived since `start` is what was sent."""
        if not self.absent and sent:
            try:
                self._call(expected=list(sent), version=version)
            except EngineError as error:
                raise EngineError(f"{engine}: {error}") from error

    def _call(self, **arguments: Any) -> None:
        try:
            self._engine.collective_rpc(WEIGHTS, **arguments)
        except (AssertionError, AttributeError, RuntimeError) as error:
            text = str(error)
            raise EngineError(
                text if text.startswith(CHANGED) else f"the plugin {NAME} does not verify weights: {text}"
            ) from error
