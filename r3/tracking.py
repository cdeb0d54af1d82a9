"""Where the numbers go: console line, `metrics.jsonl` and W&B. A tracker that fails warns; it never stops a run."""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r3 import charts
from r3.audit import Alarm
from r3.config import Config, TrackingConfig
from r3.errors import ConfigError
from r3.run import RunDirectory
from r3.tokens import TokenReport

log = logging.getLogger("r3")

# The order of the console line: what tells at a glance whether a run is healthy.
_LINE = (
    ("reward", "rollout/reward_mean", "{:.3f}"),
    ("heldout", "eval/reward_mean", "{:.3f}"),
    ("k3", "mismatch/k3", "{:.2e}"),
    ("native k3", "mismatch_native/k3", "{:.2e}"),
    ("coverage", "router/coverage", "{:.3f}"),
    ("grad", "train/grad_norm", "{:.2f}"),
    ("tok/s", "rollout/tokens_per_s", "{:.0f}"),
    ("step", "time/step_s", "{:.2f}s"),
)

# A rule that every step breaks is not worth a message a step.
_ALERT_PAUSE_S = 600


class Tracker:
    """Writes every step to the run directory, the console and W&B."""

    def __init__(self, config: Config, run: RunDirectory) -> None:
        self._run = run
        self._steps = config.run.steps
        self._wandb = open_wandb(config, run.path)

    def log(self, step: int, metrics: Mapping[str, float], tokens: TokenReport | None = None) -> None:
        """Record the metrics of one step, and its single tokens where it looked at them."""
        row = {"step": step, **metrics}
        self._run.log_metrics(row)
        if tokens is not None:
            self._run.log_tokens(tokens)
        print(console_line(step, self._steps, metrics), flush=True)
        if self._wandb is not None:
            try:
                self._wandb.log({**row, **charts.of_step(metrics, tokens)})
            except Exception as error:  # noqa: BLE001 - the tracker is a guest: whatever it raises must not end a run
                self._give_up(error)

    def alert(self, step: int, alarm: Alarm) -> None:
        """Send an alarm as a W&B alert, to whom the project notifies; of one rule at most every ten minutes."""
        if self._wandb is not None:
            try:
                self._wandb.alert(
                    title=f"r3: {alarm.rule}",
                    text=f"step {step}: {alarm.sentence}",
                    level="WARN",
                    wait_duration=_ALERT_PAUSE_S,
                )
            except Exception as error:  # noqa: BLE001 - as in `log`
                self._give_up(error)

    def close(self, exit_code: int) -> None:
        """Finish the W&B run; offline data stays under `RUN/wandb` for `wandb sync`."""
        if self._wandb is not None:
            try:
                self._wandb.finish(exit_code=exit_code)
            except Exception as error:  # noqa: BLE001 - `ray job stop` ends W&B's own process together with ours
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        log.warning("W&B failed and is switched off for the rest of the run: %s", error)
        self._run.log_event("wandb_failed", error=str(error))
        self._wandb = None


def console_line(step: int, steps: int, metrics: Mapping[str, float]) -> str:
    """Return the one line per step."""
    parts = [f"{name} {form.format(metrics[key])}" for name, key, form in _LINE if key in metrics]
    return f"step {step:>{len(str(steps))}}/{steps} | " + " | ".join(parts)


def wandb_mode(config: TrackingConfig, environ: Mapping[str, str]) -> str:
    """Return `online`, `offline` or `disabled`: WANDB_MODE, else the config, where `auto` is online only with a key."""
    mode = environ.get("WANDB_MODE") or config.wandb
    if mode != "auto":
        return mode
    return "online" if environ.get("WANDB_API_KEY") or _has_netrc_entry() else "offline"


def open_wandb(config: Config, directory: Path) -> Any | None:
    """Start the W&B run, or return None when it is disabled or, unless asked to be online, cannot start."""
    mode = wandb_mode(config.tracking, os.environ)
    if mode == "disabled":
        return None
    try:
        import wandb
    except ImportError:
        if mode == "online":
            raise ConfigError("tracking.wandb=online needs wandb: pip install 'rollout-router-replay[wandb]'") from None
        log.warning("wandb is not installed; metrics go to %s only", directory / "metrics.jsonl")
        return None
    try:
        run = wandb.init(
            project=config.tracking.project,
            entity=config.tracking.entity,
            name=directory.name,
            dir=str(directory),
            mode=mode,  # type: ignore[arg-type]
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True),
        )
        charts.define(run)
    except Exception as error:
        if mode == "online" and config.tracking.wandb == "online":
            raise ConfigError(f"tracking.wandb=online, but W&B cannot start: {error}") from error
        log.warning("W&B cannot start (%s); metrics go to %s only", error, directory / "metrics.jsonl")
        return None
    return run


def _has_netrc_entry() -> bool:
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
