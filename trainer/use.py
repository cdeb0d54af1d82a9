"""What a pass does with routing records; plain values, so that the driver can ask for it."""

from __future__ import annotations

from dataclasses import dataclass

from r3.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RouterFault:
    """A router that is wrong on purpose, for the control rows of `r3.mismatch`; a training step never has one.

    `uniform_gates`: the chosen experts weigh 1/k each, whatever their scores. `noise`: standard deviations of a row's
    scores that are added, normally distributed, where the router makes its *own* choice; gate weights stay those of
    the clean scores. Replayed rows make no own choice, so noise does not reach them.
    """

    uniform_gates: bool = False
    noise: float = 0.0


@dataclass(frozen=True, slots=True)
class RoutingUse:
    """How one pass uses the records: `force` replays them, otherwise they are only compared with the own choice.

    `compare` counts where the model's own choice is another one; without, a pass only replays, and counts what it used.
    `audit` adds overlaps at three lags; `keep` hands the model's own choice back as microbatches that replay it (R2).
    `layers`: global indices of the MoE layers that are forced, None for all; `sampled_rows`: only the records of rows
    whose input token was sampled count as records. `fault`: see `RouterFault`. `trace` keeps, for every response token,
    the layers that disagree. Raises `ConfigError` for an audit or a trace that does not compare.
    """

    force: bool
    audit: bool = False
    keep: bool = False
    layers: tuple[int, ...] | None = None
    sampled_rows: bool = False
    fault: RouterFault | None = None
    trace: bool = False
    compare: bool = True

    def __post_init__(self) -> None:
        if (self.audit or self.trace) and not self.compare:
            raise ConfigError("an audit or a trace compares the own choice with the record; leave compare=True")
