"""Ray rules: connect to the cluster that RAY_ADDRESS names, else start a private one for this run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from r3.config import Config
from r3.errors import EngineError


@dataclass(frozen=True, slots=True)
class Demand:
    """What the actors of a run ask of the cluster."""

    cpus: float
    gpus: float


def demand(config: Config) -> Demand:
    """Return the CPUs and GPUs that rollout and trainer actors reserve together."""
    return Demand(
        cpus=config.rollout.workers + config.trainer.processes,
        gpus=config.rollout.workers * config.rollout.gpus_per_worker
        + config.trainer.processes * config.trainer.gpus_per_process,
    )


@contextmanager
def ray_cluster(config: Config) -> Iterator[None]:
    """Hold a Ray connection for the length of a run; a cluster that was started here ends with it.

    Inside a Ray job, or with RAY_ADDRESS set, the existing cluster is taken as it is. Raises `EngineError` when its
    CPUs or GPUs cannot hold the run's actors, instead of waiting for ever.
    """
    import ray

    needed = demand(config)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    else:
        # Actors take turns (generate, then train), so a machine with fewer cores than actors only runs them slower.
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, int(needed.cpus)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        _require(needed, ray.cluster_resources())
        yield
    finally:
        ray.shutdown()


def _require(needed: Demand, resources: dict[str, float]) -> None:
    for name, amount in (("CPU", needed.cpus), ("GPU", needed.gpus)):
        if amount > resources.get(name, 0):
            raise EngineError(
                f"the run needs {amount:g} {name}s for its actors, the Ray cluster has {resources.get(name, 0):g}; "
                "lower rollout.workers or trainer.processes, or use a larger cluster"
            )
