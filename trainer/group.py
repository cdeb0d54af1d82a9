"""The driver's handle on the trainer: one Ray actor per rank, called together."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from r3.checkpoint import FileRecord
from r3.config import Config
from r3.errors import CheckpointError, EngineError, R3Error
from r3.trainer.outcome import Recomputed, Rehearsal
from r3.trainer.port import OutletPort, failures, root_cause
from r3.trainer.use import RoutingUse
from r3.transport import BatchRef, Fetched, fetch, transport_metrics
from r3.types import ModelSpec, StepResult
from r3.weights import NCCL_ENVIRONMENT, SENDER_ENVIRONMENT, Site, WeightBuckets

if TYPE_CHECKING:
    from r3.trainer.outlet import WeightOutlet


class TrainerRank:
    """The actor round a `TrainerWorker`; torch and Megatron-core are imported in its process alone."""

    def __init__(self, config: Config, model_dir: str, rank: int, world: int) -> None:
        self._arguments = (config, model_dir, rank, world)
        self._outlet: WeightOutlet | None = None

    def start(self) -> ModelSpec:
        """Make the worker: a call of its own, because an error of an actor's constructor loses its type."""
        config, model_dir, rank, world = self._arguments
        if config.trainer.gpus_per_process == 0:
            # Both are read once, when torch loads. A rank on the CPU must not find a GPU that Ray did not give it.
            os.environ["OMP_NUM_THREADS"] = "1"
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        elif config.trainer.tensor_parallel > 1:
            # Megatron-core overlaps the gradients' communication by the order in which kernels are queued.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if config.trainer.gpus_per_process and config.run.deterministic:
            # Without it cuBLAS picks a work space per stream, and torch refuses deterministic matrix products.
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        if config.trainer.gpus_per_process and config.weights.transport in ("auto", "broadcast"):
            wanted = NCCL_ENVIRONMENT | (SENDER_ENVIRONMENT if rank == 0 else {})
            for key, value in wanted.items():
                os.environ.setdefault(key, value)
        from r3.trainer.worker import TrainerWorker

        self._worker = TrainerWorker(config, model_dir, rank, world, config.run.steps * config.grpo.mini_steps)
        return self._worker.spec()

    def host_port(self) -> tuple[str, int]:
        """See `TrainerWorker`; the host is the address by which Ray's other nodes know this one."""
        host, port = self._worker.host_port()
        return (ray.util.get_node_ip_address() if self._arguments[-1] > 1 else host), port

    def join(self, host: str, port: int) -> None:
        """See `TrainerWorker`."""
        self._worker.join(host, port)
        # Modules and model live as long as this process. A walk of the collector through them holds up the step that it
        # falls into by 0.2 s, and with it every other rank.
        gc.collect()
        gc.freeze()

    def versions(self) -> dict[str, str]:
        """See `TrainerWorker`."""
        return self._worker.versions()

    def audit(self, batches: Sequence[BatchRef]) -> tuple[dict[str, float], Fetched]:
        """Fetch this rank's part of the batches; see `TrainerWorker`."""
        found, fetched = fetch(batches, self._worker.layers)
        return self._worker.audit(*found), fetched

    def step(
        self, step: int, advantages: NDArray[np.float32], counterfactual: bool, batches: Sequence[BatchRef]
    ) -> tuple[StepResult | None, Fetched]:
        """Fetch this rank's part of the batches; see `TrainerWorker`."""
        found, fetched = fetch(batches, self._worker.layers)
        return self._worker.step(step, advantages, counterfactual, *found), fetched

    def measure(self, uses: Sequence[RoutingUse], batches: Sequence[BatchRef]) -> Recomputed | None:
        """Fetch this rank's part of the batches; see `TrainerWorker`."""
        found, _ = fetch(batches, self._worker.layers)
        return self._worker.measure(uses, *found)

    def rehearse(self, advantages: NDArray[np.float32], batches: Sequence[BatchRef]) -> tuple[Rehearsal, Fetched]:
        """Fetch this rank's part of the batches; see `TrainerWorker`."""
        found, fetched = fetch(batches, self._worker.layers)
        return self._worker.rehearse(advantages, *found), fetched

    def export(self) -> tuple[tuple[int, int], WeightBuckets | None]:
        """Return weight version and bytes and, as an object of its own, the weights: the driver fetches the first."""
        weights = self._worker.export()
        return (self._worker.weight_version, weights.nbytes if weights else 0), weights

    def site(self) -> Site:
        """Say where this rank stands, with its own GPU alone."""
        return Site(ray.get_runtime_context().get_node_id(), self._weights().gpus())

    def address(self) -> str:
        """Return the address by which Ray's other nodes know this one."""
        return str(ray.util.get_node_ip_address())

    def weights(self, method: str, *arguments: Any) -> Any:
        """Call a method of this rank's `WeightOutlet`."""
        return getattr(self._weights(), method)(*arguments)

    def _weights(self) -> WeightOutlet:
        if self._outlet is None:
            self._outlet = self._worker.outlet()
        return self._outlet

    def save_hf(self, directory: str) -> None:
        """See `TrainerWorker`."""
        self._worker.save_hf(directory)

    def save_state(self, directory: str) -> FileRecord:
        """See `TrainerWorker`."""
        return self._worker.save_state(directory)

    def load_state(self, directory: str) -> int:
        """See `TrainerWorker`."""
        return self._worker.load_state(directory)


@dataclass(frozen=True, slots=True)
class Exported:
    """A full set of weights in the object store: a reference to its `WeightBuckets`, their version and bytes."""

    ref: ray.ObjectRef
    version: int
    nbytes: int


class TrainerGroup:
    """All trainer ranks of a run; a context manager.

    Every call is collective and blocks. A rank's own `RoutingError`, `ConfigError` or `CheckpointError` comes out as it
    is; a dead rank, a time-out (`trainer.start_timeout_s`, `trainer.timeout_s`) or any other failure is an
    `EngineError` that names the rank. After an error inside a step only `close` may follow: the ranks may no longer
    stand at the same place.
    """

    def __init__(self, config: Config, model_dir: str | Path, place: PlacementGroup | None = None) -> None:
        """Start every rank, in its bundle of `place` (`r3.cluster.Places`) or, without one, where Ray chooses."""
        trainer = config.trainer
        self._timeout = trainer.timeout_s
        world = trainer.processes
        self._ranks = [
            ray.remote(TrainerRank)
            .options(
                num_cpus=1,
                num_gpus=trainer.gpus_per_process,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(place, rank) if place else None,
            )
            .remote(config, str(model_dir), rank, world)
            for rank in range(world)
        ]
        limit = time.monotonic() + trainer.start_timeout_s
        try:
            self._spec = self._wait([rank.start.remote() for rank in self._ranks], "start", limit)[0]
            ((host, port),) = self._wait([self._ranks[0].host_port.remote()], "start", limit)
            self._wait([rank.join.remote(host, port) for rank in self._ranks], "start", limit)
        except R3Error:
            self.close()
            raise

    def __enter__(self) -> TrainerGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def spec(self) -> ModelSpec:
        """Return the facts of the model in training."""
        return self._spec

    def versions(self) -> dict[str, str]:
        """Return what rank 0 runs on."""
        return self._wait([self._ranks[0].versions.remote()], "versions", time.monotonic() + self._timeout)[0]

    def audit(self, batches: Sequence[BatchRef]) -> Mapping[str, float]:
        """Compare engine and trainer on captured batches; see `TrainerWorker.audit`. Adds `transport/*`."""
        reports, fetched = zip(*self._all("audit", batches), strict=True)
        return {**reports[0], **transport_metrics(fetched)}

    def step(
        self, step: int, advantages: NDArray[np.float32], counterfactual: bool, batches: Sequence[BatchRef]
    ) -> StepResult:
        """Train one step; every rank fetches the blocks of its own layers, which Ray maps into it without a copy."""
        results, fetched = zip(*self._all("step", step, advantages, counterfactual, batches), strict=True)
        return replace(results[0], metrics={**results[0].metrics, **transport_metrics(fetched)})

    def measure(self, uses: Sequence[RoutingUse], batches: Sequence[BatchRef]) -> Recomputed:
        """Recompute the log-probs of some batches under each of `uses`; see `TrainerWorker.measure`."""
        found: Recomputed = self._all("measure", uses, batches)[0]
        return found

    def rehearse(
        self, advantages: NDArray[np.float32], batches: Sequence[BatchRef]
    ) -> tuple[Rehearsal, Mapping[str, float]]:
        """Run one forced-routing step of known outcome; return it as rank 0 has it, and `transport/*`."""
        results, fetched = zip(*self._all("rehearse", advantages, batches), strict=True)
        return results[0], transport_metrics(fetched)

    def export(self) -> Exported:
        """Return the new weights, ready in the object store."""
        # Every rank sends its part to rank 0, which returns them all.
        calls = [rank.export.options(num_returns=2).remote() for rank in self._ranks]
        facts = self._wait([facts for facts, _ in calls], "export", time.monotonic() + self._timeout)
        return Exported(calls[0][1], *facts[0])

    def outlet(self) -> OutletPort:
        """Return the driver's handle on the ranks as senders of weights."""
        return OutletPort(self._ranks, self._timeout)

    def save_hf(self, directory: str | Path) -> None:
        """Write the model as a Hugging Face checkpoint directory."""
        self._all("save_hf", str(directory))

    def save_state(self, directory: str | Path) -> list[FileRecord]:
        """Let every rank write its state into a directory that all of them see; return the files, synchronised."""
        return self._all("save_state", str(directory))

    def load_state(self, directory: str | Path) -> int:
        """Let every rank go on from its saved state; return the weight version."""
        versions: list[int] = self._all("load_state", str(directory))
        if len(set(versions)) > 1:
            raise CheckpointError(f"{directory}: the ranks hold weight versions {versions}")
        return versions[0]

    def close(self) -> None:
        """End all ranks; harmless when some are dead already."""
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = []

    def _all(self, method: str, *args: Any) -> list[Any]:
        calls = [getattr(rank, method).remote(*args) for rank in self._ranks]
        return self._wait(calls, method, time.monotonic() + self._timeout)

    def _wait(self, calls: Sequence[ray.ObjectRef], what: str, limit: float) -> list[Any]:
        """Collect one result per rank, looking at them as they come: behind a failed rank the others would hang."""
        pending = {call: rank for rank, call in enumerate(calls)}
        results: dict[int, Any] = {}
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1, timeout=max(0.0, limit - time.monotonic()))
            if not done:
                late = ", ".join(map(str, pending.values()))
                raise EngineError(
                    f"trainer rank {late} did not finish {what!r} in time; "
                    "raise trainer.timeout_s (trainer.start_timeout_s) if it is only slow"
                )
            rank = pending.pop(done[0])
            try:
                results[rank] = ray.get(done[0])
            except (RayTaskError, RayActorError) as error:
                raise root_cause({rank: error} | failures(pending), what) from error
        return [results[rank] for rank in range(len(calls))]
