"""Records that are wrong on purpose, structurally perfect and with right checksums, for control measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from r3.errors import RoutingError
from r3.routing import ExpertIds, RoutingTrace
from r3.types import Trajectory

Change = Callable[[Sequence[Trajectory]], list[Trajectory]]


def shift(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Give every token the experts of the one before it."""
    return [_rewritten(one, np.roll(_experts(one), 1, axis=0)) for one in trajectories]


def neighbour(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Give every sequence the experts of an answer to another prompt, as far as both have rows."""
    others = _of_other_groups(trajectories)
    swapped = []
    for mine, other in zip(trajectories, others, strict=True):
        experts = _experts(mine).copy()
        rows = min(len(experts), len(_experts(other)))
        experts[:rows] = _experts(other)[:rows]
        swapped.append(_rewritten(mine, experts))
    return swapped


def reverse(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Give every layer the experts of its mirror image."""
    return [_rewritten(one, _experts(one)[:, ::-1]) for one in trajectories]


def _of_other_groups(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Return for each trajectory one of the next group; of the first for the last."""
    groups = sorted({one.group for one in trajectories})
    if len(groups) < 2:
        raise RoutingError("neighbour's routes need answers to at least two prompts")
    following = dict(zip(groups, [*groups[1:], groups[0]], strict=True))
    members = {group: [one for one in trajectories if one.group == group] for group in groups}
    return [members[following[one.group]][one.member % len(members[following[one.group]])] for one in trajectories]


def _experts(trajectory: Trajectory) -> ExpertIds:
    if trajectory.routing is None:
        raise RoutingError(f"group {trajectory.group}, member {trajectory.member} has no record to change")
    return trajectory.routing.experts


def _rewritten(trajectory: Trajectory, experts: ExpertIds) -> Trajectory:
    assert trajectory.routing is not None
    trace = RoutingTrace.record(
        experts,
        trajectory.tokens,
        layers=trajectory.routing.layers,
        num_experts=trajectory.routing.num_experts,
        weight_version=trajectory.weight_version,
        engine=trajectory.routing.engine,
    )
    return replace(trajectory, routing=trace)
