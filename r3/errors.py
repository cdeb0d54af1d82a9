"""Error types of R3; each carries the exit code that the command line maps it to."""

from __future__ import annotations


class R3Error(Exception):
    """Base of every error that R3 raises on purpose; the message names the thing, the value and the fix."""

    exit_code = 1


class ConfigError(R3Error):
    """A configuration, path or argument that cannot work; found before anything heavy starts."""

    exit_code = 2


class RoutingError(R3Error):
    """A routing record that is missing, malformed or belongs to other tokens."""

    exit_code = 3


class MissingRoutingError(RoutingError):
    """No routing record came back at all; `routing.on_missing` decides what becomes of the sample."""


class EngineError(R3Error):
    """The inference engine, a Ray actor or the cluster failed or refused to work."""

    exit_code = 4


class CheckpointError(R3Error):
    """A checkpoint or run directory that is incomplete, foreign or not writable."""

    exit_code = 5


class DivergenceError(R3Error):
    """Training left the region in which its numbers mean anything (non-finite or runaway mismatch)."""

    exit_code = 6
