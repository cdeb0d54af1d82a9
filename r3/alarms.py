"""Alarms over a step's numbers: mismatch, expert load, dead experts, drift of the expert histogram; numpy only.

The audit (`r3.audit`) asks whether a record belongs to its tokens; these rules ask whether engine and trainer still
agree and whether the router is still alive. The rules are those of docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from r3.audit import Alarm
from r3.metrics import Floats, load_drift, load_imbalance

Loads = NDArray[np.int64]
# With fewer choices per expert, one that is never chosen may be chance.
MIN_CHOICES_PER_EXPERT = 8


@dataclass(frozen=True, slots=True)
class AlarmLimits:
    """Thresholds, under the names of the configuration keys `metrics.alarm_*`.

    `k3`: nats; `load`: times the mean; `dead`: share of a layer's experts; `drift`: total variation distance.
    """

    k3: float
    load: float
    dead: float
    drift: float


@dataclass(frozen=True, slots=True)
class EarlyLoads:
    """Expert loads `[layers, experts]` of the first steps of a run that had any, by step."""

    by_step: Mapping[int, Loads]

    def with_step(self, step: int, loads: Loads, steps: int) -> EarlyLoads:
        """Add one step while there are fewer than `steps`."""
        if len(self.by_step) >= steps or step in self.by_step or not loads.any():
            return self
        return EarlyLoads({**self.by_step, step: loads})

    def until(self, step: int) -> EarlyLoads:
        """Return what a run resumed behind `step` knows."""
        return EarlyLoads({number: loads for number, loads in self.by_step.items() if number <= step})

    def drift(self, step: int, loads: Loads, steps: int) -> Floats | None:
        """Return the drift of a step's loads per layer; None before `steps` early steps, and for one of them."""
        if len(self.by_step) < steps or step in self.by_step or not loads.any():
            return None
        return load_drift(loads, np.sum(list(self.by_step.values()), 0))


def find_step_alarms(
    report: Mapping[str, float],
    loads: Loads,
    drift: Floats | None,
    *,
    layers: Sequence[int],
    top_k: int,
    limits: AlarmLimits,
) -> tuple[Alarm, ...]:
    """Apply the rules to one step; for each the worst layer alone is named.

    `report`: the step's metrics; `loads` int64 `[layers, experts]` and `drift` `[layers]` of its records; `layers`:
    global index of each MoE layer.
    """
    found = [_k3(report, limits.k3)]
    if len(loads) and loads.any():
        found += [_load(loads, layers, limits.load), _dead(loads, layers, top_k, limits.dead)]
    if drift is not None:
        found.append(_drift(drift, layers, limits.drift))
    return tuple(alarm for alarm in found if alarm is not None)


def _k3(report: Mapping[str, float], limit: float) -> Alarm | None:
    value = report.get("mismatch/k3", 0.0)
    if value <= limit:
        return None
    text = (
        f"mismatch/k3 is {value:.3g} nats, limit {limit:g} (metrics.alarm_k3): trainer and engine compute different "
        "distributions; look at the record (router/lag0_overlap), the weights and the temperature"
    )
    return Alarm("k3", value, limit, text)


def _load(loads: Loads, layers: Sequence[int], limit: float) -> Alarm | None:
    imbalance = load_imbalance(loads)
    worst = int(imbalance.argmax())
    value = float(imbalance[worst])
    if value <= limit:
        return None
    text = (
        f"layer {layers[worst]}: expert {int(loads[worst].argmax())} gets {value:.3g} times the mean load, limit "
        f"{limit:g} (metrics.alarm_load): the router collapses onto few experts"
    )
    return Alarm("load", value, limit, text, layer=layers[worst])


def _dead(loads: Loads, layers: Sequence[int], top_k: int, limit: float) -> Alarm | None:
    enough = loads.sum(1) >= MIN_CHOICES_PER_EXPERT * loads.shape[1]
    shares = np.where(enough, (loads == 0).mean(1), 0.0)
    worst = int(shares.argmax())
    value, used = float(shares[worst]), int((loads[worst] > 0).sum())
    # A layer without a choice at all would stay below the share where k is more than half of the experts.
    dead_layer = bool(enough[worst]) and used <= top_k < loads.shape[1]
    if value <= limit and not dead_layer:
        return None
    what = "sends every row to the same experts" if dead_layer else f"uses {used} of {loads.shape[1]} experts"
    text = f"layer {layers[worst]} {what}: {value:.0%} of its experts are dead, limit {limit:.0%} (metrics.alarm_dead)"
    return Alarm("dead", value, limit, text, layer=layers[worst])


def _drift(drift: Floats, layers: Sequence[int], limit: float) -> Alarm | None:
    worst = int(drift.argmax())
    value = float(drift[worst])
    if value <= limit:
        return None
    text = (
        f"layer {layers[worst]}: the expert histogram is {value:.2f} away from that of the run's early steps, limit "
        f"{limit:g} (metrics.alarm_drift): prompts, router or capture have changed"
    )
    return Alarm("drift", value, limit, text, layer=layers[worst])
