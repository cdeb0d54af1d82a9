"""Pushing weights over real Ray actors: several engines, deaths on the way, groups; the engines have no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from r3.config import Config
from r3.errors import ConfigError, EngineError
from r3.rollout.pool import RolloutPool
from r3.sync import WeightSync
from r3.types import Prompt
from tests.weight_sender import Senders

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

MakeConfig = Callable[..., Config]
PROMPTS = tuple(Prompt(i, f"prompt number {i}", str(i)) for i in range(8))
STREAMED = "tests.streamed_engine:StreamedFake"


class Events(list[tuple[str, dict[str, Any]]]):
    """Collects what pool and push report."""

    def __call__(self, kind: str, **facts: Any) -> None:
        self.append((kind, facts))

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self]


@pytest.fixture(scope="module")
def weights_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six tensors of 384 KiB, so that a bucket of 1 MiB takes two."""
    import torch
    from safetensors.torch import save_file

    directory = tmp_path_factory.mktemp("weights")
    save_file({f"w{i}": torch.full((96, 1024), float(i)) for i in range(6)}, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def senders(ray_session: None, make_config: MakeConfig) -> Iterator[Senders]:
    made = Senders(streamed(make_config, "auto"))
    yield made
    made.close()


def streamed(make_config: MakeConfig, way: str, faults: dict[str, Any] | None = None, **rollout: Any) -> Config:
    config = make_config(faults, engine=STREAMED, dtype="float32", **rollout).model_dump()
    config["weights"] |= {"transport": way, "bucket_mib": 1, "timeout_s": 8}
    return Config.model_validate(config)


def versions(pool: RolloutPool) -> set[int]:
    return {fact.weight_version for fact in pool.generate(PROMPTS, 1).facts}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ipc", "broadcast"])
def test_engines_take_the_weights_again_and_again(
    make_config: MakeConfig, model_dir: Path, weights_dir: Path, senders: Senders, way: str
) -> None:
    events = Events()
    config = streamed(make_config, way, workers=2)
    with (
        RolloutPool(config, model_dir, events) as pool,
        WeightSync(config, pool, senders, events) as sync,  # type: ignore[arg-type]  (stands for the trainer)
    ):
        for version in (3, 4):
            senders.take(weights_dir, version)
            moved = sync.push()
            assert versions(pool) == {version}
            assert moved["transport/weights_bytes"] == 6 * 384 * 1024
            assert moved["transport/weights_extra_bytes"] == 2 * 2**20
    assert events == [("weights_transport", {"transports": [way] * 2, "reason": "weights.transport asks for it"})]


@pytest.mark.parametrize(
    ("where", "way"),
    [
        ("load_part", "broadcast"),
        pytest.param("load_part", "ipc", marks=pytest.mark.slow),
        *(
            pytest.param(where, "broadcast", marks=pytest.mark.slow)
            for where in ("join_group", "begin_weights", "end_weights")
        ),
    ],
)
def test_an_engine_that_dies_in_a_push_is_replaced_and_every_engine_gets_the_weights(
    make_config: MakeConfig, model_dir: Path, weights_dir: Path, senders: Senders, tmp_path: Path, where: str, way: str
) -> None:
    events = Events()
    config = streamed(make_config, way, {"die_in": where, "die_once": str(tmp_path / "died")}, workers=2)
    with (
        RolloutPool(config, model_dir, events) as pool,
        WeightSync(config, pool, senders, events) as sync,  # type: ignore[arg-type]
    ):
        senders.take(weights_dir, 5)
        sync.push()
        assert versions(pool) == {5}
    assert events.kinds() == [
        "weights_transport", "weights_interrupted", "rollout_worker_died", "rollout_worker_replaced"
    ]  # fmt: skip
    assert senders.shared_files() == [], "the trainer keeps buckets that nobody opens"


@pytest.mark.parametrize("way", [pytest.param("ipc", marks=pytest.mark.slow), "broadcast"])
def test_an_engine_that_dies_between_pushes_gets_the_current_weights_alone(
    make_config: MakeConfig, model_dir: Path, weights_dir: Path, senders: Senders, tmp_path: Path, way: str
) -> None:
    events = Events()
    config = streamed(make_config, way, {"die_in": "generate", "die_once": str(tmp_path / "died")}, workers=2)
    with (
        RolloutPool(config, model_dir, events) as pool,
        WeightSync(config, pool, senders, events) as sync,  # type: ignore[arg-type]
    ):
        for version in (6, 7):
            senders.take(weights_dir, version)
            sync.push()
            assert versions(pool) == {version}
    assert events.kinds() == ["weights_transport", "rollout_worker_died", "rollout_worker_replaced"]


@pytest.mark.slow
def test_a_replaced_engine_is_not_given_later_weights_than_the_others(
    make_config: MakeConfig, model_dir: Path, weights_dir: Path, senders: Senders, tmp_path: Path
) -> None:
    config = streamed(make_config, "ipc", {"die_in": "generate", "die_once": str(tmp_path / "died")}, workers=2)
    with RolloutPool(config, model_dir) as pool, pytest.raises(EngineError, match="the trainer holds weights 9"):  # noqa: PT012
        sync = WeightSync(config, pool, senders, lambda *_, **__: None)  # type: ignore[arg-type]
        senders.take(weights_dir, 8)
        sync.push()
        senders.take(weights_dir, 9)
        pool.generate(PROMPTS, 1)


def test_an_engine_that_takes_no_buckets_is_named_before_the_first_push(
    make_config: MakeConfig, model_dir: Path, senders: Senders
) -> None:
    config = streamed(make_config, "broadcast").model_dump()
    config["rollout"]["engine"] = "tests.fake_engine:FakeEngine"
    events = Events()
    with RolloutPool(Config.model_validate(config), model_dir) as pool:
        with pytest.raises(ConfigError, match=r"weights.transport=broadcast, but fake 1 takes weights by object_store"):
            WeightSync(Config.model_validate(config), pool, senders, events)  # type: ignore[arg-type]
        config["weights"]["transport"] = "auto"
        WeightSync(Config.model_validate(config), pool, senders, events)  # type: ignore[arg-type]
    assert events.kinds() == ["weights_transport", "weights_unverified"]
