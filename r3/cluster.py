"""Ray rules: connect to the cluster that RAY_ADDRESS names, else start a private one for this run."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from r3.config import Config
from r3.errors import EngineError

# Seconds; a signal ends a wait for room after so long at most.
_TURN_S = 1.0


@dataclass(frozen=True, slots=True)
class Demand:
    """What the actors of a run ask of the cluster."""

    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True)
class Places:
    """Reserved room in the cluster: a Ray placement group each, with one bundle per rollout worker or trainer rank."""

    rollout: Any
    trainer: Any


def demand(config: Config) -> Demand:
    """Return the CPUs and GPUs that rollout and trainer actors reserve together."""
    return Demand(
        cpus=config.rollout.workers + config.trainer.processes,
        gpus=config.rollout.workers * config.rollout.gpus_per_worker
        + config.trainer.processes * config.trainer.gpus_per_process,
    )


@contextmanager
def ray_cluster(config: Config) -> Iterator[Places]:
    """Hold a Ray connection and room for all actors for the length of a run; a cluster started here ends with it.

    Inside a Ray job, or with RAY_ADDRESS set, the existing cluster is taken as it is. Raises `EngineError` when it
    cannot be reached or its CPUs or GPUs cannot hold the run's actors, instead of waiting for ever.
    """
    import ray

    needed = demand(config)
    address = os.environ.get("RAY_ADDRESS")
    # Actors take turns (generate, then train), so a machine with fewer cores than actors only runs them slower.
    cpus = max(os.cpu_count() or 1, int(needed.cpus))
    own: dict[str, Any] = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    if needed.gpus and not address:
        # Ray counts GPUs by NVML, which a container may hide; torch counts those that can be used.
        import torch

        own["num_gpus"] = torch.cuda.device_count()
    try:
        ray.init(**({} if address else own), log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises ConnectionError, ValueError, or plain Exception for a node that is too slow
        what = f"no Ray cluster answers at RAY_ADDRESS={address}" if address else "a local Ray cluster did not start"
        raise EngineError(f"{what}: {error}") from error
    try:
        _require(needed, ray.cluster_resources())
        yield _reserve(config)
    finally:
        ray.shutdown()


def _reserve(config: Config) -> Places:
    """Reserve a place for every actor, all or none, so that two runs on one cluster never block each other half-way.

    Placement groups end with the driver. Raises `EngineError` when other runs hold the room for too long.
    """
    from ray.util import placement_group

    def group(actors: int, gpus: float, placement: str) -> Any:
        bundle = {"CPU": 1.0} | ({"GPU": gpus} if gpus else {})
        return placement_group([bundle] * actors, strategy=placement.upper())

    rollout, trainer = config.rollout, config.trainer
    places = Places(
        rollout=group(rollout.workers, rollout.gpus_per_worker, rollout.placement),
        trainer=group(trainer.processes, trainer.gpus_per_process, trainer.placement),
    )
    for side, place, limit in (
        ("rollout", places.rollout, rollout.start_timeout_s),
        ("trainer", places.trainer, trainer.start_timeout_s),
    ):
        if not _has_room(place, limit):
            raise EngineError(
                f"the Ray cluster had no room for the {side} actors within {limit:g} s ({side}.start_timeout_s); "
                "is another run using it?"
            )
    return places


def _has_room(place: Any, limit: float) -> bool:
    """Wait at most `limit` seconds for a placement group, in turns: Ray heeds no signal inside of one."""
    until = time.monotonic() + limit
    while not place.wait(min(_TURN_S, max(0.0, until - time.monotonic()))):
        if time.monotonic() >= until:
            return False
    return True


def _require(needed: Demand, resources: dict[str, float]) -> None:
    for name, amount in (("CPU", needed.cpus), ("GPU", needed.gpus)):
        if amount > resources.get(name, 0):
            raise EngineError(
                f"the run needs {amount:g} {name}s for its actors, the Ray cluster has {resources.get(name, 0):g}; "
                "lower rollout.workers or trainer.processes, or use a larger cluster"
            )
