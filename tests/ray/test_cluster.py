"""Where Ray puts the actors: an existing cluster of two nodes on this machine, packed or spread over them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from r3.cluster import Demand, _reserve, demand, ray_cluster
from r3.config import Config, load_config
from r3.errors import EngineError

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[str]:
    """Address of a cluster whose nodes have room for two actors each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    yield str(cluster.address)
    cluster.shutdown()


def config(**sections: dict[str, object]) -> Config:
    return Config.model_validate(sections)


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a process of its own: this one may hold the test session's Ray connection, and holds one at most."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result(timeout=300)


def nodes_of(place: object, actors: int) -> list[str]:
    """Run a task in every bundle of a placement group and return the nodes that they ran on."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    def node() -> str:
        return str(ray.get_runtime_context().get_node_id())

    remote = ray.remote(node)
    spots = [PlacementGroupSchedulingStrategy(place, index) for index in range(actors)]
    return ray.get([remote.options(num_cpus=1, scheduling_strategy=spot).remote() for spot in spots], timeout=120)


def places_of(wanted: Config) -> tuple[list[str], list[str]]:
    """The nodes of two trainer ranks and of one rollout worker."""
    with ray_cluster(wanted) as places:
        return nodes_of(places.trainer, 2), nodes_of(places.rollout, 1)


def enter(wanted: Config) -> None:
    with ray_cluster(wanted):
        pass


def enter_a_full_one(wanted: Config) -> None:
    import ray

    with ray_cluster(config(trainer={"processes": 1})):
        group = ray.util.placement_group([{"CPU": 1}] * 2)
        assert group.wait(60)
        _reserve(wanted)


@pytest.mark.parametrize(("placement", "nodes"), [("spread", 2), ("pack", 1)])
def test_ranks_are_packed_or_spread(two_nodes, monkeypatch, placement, nodes):
    monkeypatch.setenv("RAY_ADDRESS", two_nodes)
    trainer, rollout = alone(places_of, config(trainer={"processes": 2, "placement": placement}))
    assert len(set(trainer)) == nodes
    assert len(rollout) == 1


def test_a_cluster_that_is_too_small_is_refused(two_nodes, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", two_nodes)
    with pytest.raises(EngineError, match="needs 5 CPUs for its actors, the Ray cluster has 4"):
        alone(enter, config(trainer={"processes": 4}))


def test_a_cluster_that_others_fill_is_refused_in_time(two_nodes, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", two_nodes)
    wanted = config(trainer={"processes": 2, "start_timeout_s": 1}, rollout={"start_timeout_s": 1})
    with pytest.raises(EngineError, match=r"no room for the .* actors within 1 s"):
        alone(enter_a_full_one, wanted)


def gpus_of(place: object, actors: int, share: float) -> list[str]:
    """The GPUs that an actor in each bundle of a placement group sees."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    def visible() -> str:
        return os.environ["CUDA_VISIBLE_DEVICES"]

    remote = ray.remote(visible)
    spots = [PlacementGroupSchedulingStrategy(place, index) for index in range(actors)]
    calls = [remote.options(num_cpus=1, num_gpus=share, scheduling_strategy=spot).remote() for spot in spots]
    return ray.get(calls, timeout=120)


def gpus_of_run(name: str, gpus: int) -> tuple[list[str], list[str]]:
    """What the rollout workers and the trainer ranks of a shipped config see on a host with that many GPUs."""
    import ray

    wanted = load_config(name)
    # Ray takes the number as it is told; nothing touches a device.
    ray.init(address="local", num_cpus=8, num_gpus=gpus, include_dashboard=False, log_to_driver=False)
    places, rollout, trainer = _reserve(wanted), wanted.rollout, wanted.trainer
    return (
        gpus_of(places.rollout, rollout.workers, rollout.gpus_per_worker),
        gpus_of(places.trainer, trainer.processes, trainer.gpus_per_process),
    )


@pytest.mark.parametrize(
    ("name", "gpus", "rollout", "trainer"),
    [
        pytest.param("grpo_qwen3moe_1gpu.yaml", 1, 1, 1, marks=pytest.mark.slow),
        pytest.param("grpo_qwen3moe_2gpu.yaml", 2, 1, 1, marks=pytest.mark.slow),
        ("grpo_qwen3moe_4gpu.yaml", 4, 2, 2),
        pytest.param("grpo_qwen3_30b_a3b.yaml", 8, 1, 6, marks=pytest.mark.slow),
    ],
)
def test_every_actor_sees_its_own_gpus(name, gpus, rollout, trainer):
    engines, ranks = alone(gpus_of_run, name, gpus)
    assert (len(engines), len(ranks)) == (rollout, trainer)
    seen = [gpu for visible in [*engines, *ranks] for gpu in visible.split(",")]
    assert set(seen) == {str(gpu) for gpu in range(gpus)}
    # One GPU is shared by both sides, more than one by nobody.
    assert len(seen) == (2 if gpus == 1 else gpus)
    assert all(len(visible.split(",")) == 1 for visible in ranks)


def test_demand_counts_every_actor():
    engines = {"workers": 3, "gpus_per_worker": 0.5, "mem_fraction": 0.4}
    wanted = config(rollout=engines, trainer={"processes": 4, "gpus_per_process": 1})
    assert demand(wanted) == Demand(cpus=7, gpus=5.5)


def test_the_runtime_environment_is_one_that_ray_accepts():
    import yaml
    from ray.runtime_env import RuntimeEnv

    file = Path(__file__).parents[2] / "configs" / "runtime_env.yaml"
    found = RuntimeEnv(**yaml.safe_load(file.read_text()))
    assert set(found) == {"working_dir", "excludes", "env_vars"}
