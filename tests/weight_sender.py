"""The trainer's side of a weight push without a trainer: an actor that sends the tensors of a checkpoint directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import torch

from r3.config import Config
from r3.trainer.group import Exported
from r3.trainer.outlet import WeightOutlet
from r3.trainer.port import OutletPort
from r3.trainer.weights import weight_buckets
from r3.weights import Site, WeightBuckets


class Sender:
    """Stands for trainer rank 0, `r3.trainer.group.TrainerRank`; `corrupt` changes one byte of a bucket on its way."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._outlet = WeightOutlet(config, self._tensors, lambda: self._version, torch.device("cpu"))

    def take(self, directory: Path, version: int, corrupt: int | None = None) -> None:
        self._directory, self._version, self._corrupt = directory, version, corrupt

    def shared_files(self) -> list[str]:
        """Return the files in shared memory that torch made for this process (`NewProcessWideShmHandle`)."""
        return [name for name in os.listdir("/dev/shm") if name.startswith(f"torch_{os.getpid()}_")]

    def site(self) -> Site:
        return Site(ray.get_runtime_context().get_node_id(), self._outlet.gpus())

    def address(self) -> str:
        return str(ray.util.get_node_ip_address())

    def weights(self, method: str, *arguments: Any) -> Any:
        value = getattr(self._outlet, method)(*arguments)
        if method == "fill" and value.number == self._corrupt:
            assert self._outlet._bucket is not None
            self._outlet._bucket.flat[1000] ^= 1
        return value

    def export(self) -> tuple[tuple[int, int], WeightBuckets]:
        dtype = getattr(torch, self._config.rollout.dtype)
        made = weight_buckets(self._tensors(), dtype, self._config.weights.bucket_mib * 2**20, self._version)
        if self._corrupt is not None:
            made.buckets[self._corrupt].data[1000] ^= 1
        return (self._version, made.nbytes), made

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        from safetensors import safe_open

        with safe_open(str(self._directory / "model.safetensors"), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                yield name, file.get_tensor(name)


class Senders:
    """Stands for `TrainerGroup`, as far as weights go."""

    def __init__(self, config: Config) -> None:
        self.actor = ray.remote(Sender).options(num_cpus=0).remote(config)

    def take(self, directory: Path, version: int, corrupt: int | None = None) -> None:
        ray.get(self.actor.take.remote(directory, version, corrupt))

    def shared_files(self) -> list[str]:
        found: list[str] = ray.get(self.actor.shared_files.remote())
        return found

    def outlet(self) -> OutletPort:
        return OutletPort([self.actor], 60.0)

    def export(self) -> Exported:
        facts, weights = self.actor.export.options(num_returns=2).remote()
        return Exported(weights, *ray.get(facts))

    def close(self) -> None:
        ray.kill(self.actor)


class OneWorker:
    """Stands for `RolloutPool` over the engine of the test session; `call` is the fixture's."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self.reload: Callable[[int], None] | None = None

    def spec(self) -> Any:
        return self._call("call", "spec")

    def specs(self) -> list[Any]:
        return [self.spec()]

    def sites(self) -> list[Site]:
        return [self._call("site")]

    def call(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        return {worker: self._call("call", method, *given) for worker, given in arguments.items()}

    def load_weights(self, weights: Any) -> float:
        return float(self._call("call", "load_weights", weights))
