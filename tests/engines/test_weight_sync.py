"""Every way of the weights into real SGLang: the same answers, found corruption, groups that end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3.config import Config
from r3.errors import EngineError
from r3.rollout.engine import Request, Sampling
from r3.sync import WeightSync
from tests.real_engine import engine_config
from tests.tiny_model import VOCAB_SIZE
from tests.weight_sender import OneWorker, Senders

pytestmark = pytest.mark.engine

Worker = Callable[..., Any]
PROMPTS = [Request(np.random.default_rng(i).integers(2, VOCAB_SIZE, 12 + i).astype(np.int32)) for i in range(6)]


def weights_config(**weights: Any) -> Config:
    config = engine_config().model_dump()
    config["weights"] |= {"bucket_mib": 1, "timeout_s": 60} | weights
    return Config.model_validate(config)


@pytest.fixture(scope="module")
def senders(ray_session: None) -> Iterator[Senders]:
    made = Senders(weights_config())
    yield made
    made.close()


def answers(worker: Worker) -> list[tuple[list[int], list[float], int]]:
    sampling = Sampling(1.0, 8, greedy=True, ignore_eos=True)
    found = worker("engine", "generate", PROMPTS, sampling, capture=False)
    return [(one.tokens.tolist(), one.logprobs.tolist(), one.weight_version) for one in found]


def without_versions(found: list[tuple[list[int], list[float], int]]) -> list[tuple[list[int], list[float]]]:
    return [(tokens, logprobs) for tokens, logprobs, _ in found]


def test_every_way_gives_the_answers_of_the_object_store(
    stamping: Worker, senders: Senders, model_a: Path, model_b: Path
) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    made = {}
    for version, way in enumerate(("object_store", "ipc", "broadcast", "auto"), start=21):
        # Weights of another model in between, so that no load can pass for one that did nothing.
        stamping("engine", "load_weights", model_a, version)
        assert without_versions(answers(stamping)) not in made.values()
        senders.take(model_b, version)
        sync = WeightSync(
            weights_config(transport=way),
            OneWorker(stamping),
            senders,
            lambda kind, **facts: events.append((kind, facts)),
        )
        with sync:
            moved = sync.push()
        found = answers(stamping)
        assert {stamp for _, _, stamp in found} == {version}
        made[way] = without_versions(found)
        assert moved["transport/weights_bytes"] > 2**22
        if way in ("ipc", "broadcast"):
            assert moved["transport/weights_extra_bytes"] <= 2 * 2**20

    assert made["ipc"] == made["broadcast"] == made["auto"] == made["object_store"]
    assert [facts["transports"] for _, facts in events] == [["object_store"], ["ipc"], ["broadcast"], ["object_store"]]
    assert {kind for kind, _ in events} == {"weights_transport"}, "verified: no event says otherwise"


@pytest.mark.parametrize("way", ["object_store", "ipc", "broadcast"])
def test_a_byte_that_changes_on_the_way_is_found_and_the_engine_stops_answering(
    stamping: Worker, senders: Senders, model_a: Path, model_b: Path, way: str
) -> None:
    import ray

    senders.take(model_b, 31, corrupt=2)
    with WeightSync(weights_config(transport=way), OneWorker(stamping), senders, lambda *_, **__: None) as sync:
        with pytest.raises(ray.exceptions.RayTaskError, match=r"bucket 2 of \d+ of version 31 has checksum") as caught:
            sync.push()
        assert isinstance(caught.value.cause, EngineError)
        with pytest.raises(ray.exceptions.RayTaskError, match="half-loaded weights"):
            answers(stamping)
        senders.take(model_b, 32)
        sync.push()
        assert {stamp for _, _, stamp in answers(stamping)} == {32}


@pytest.mark.slow
def test_a_stock_engine_says_that_it_does_not_verify(stock: Worker, senders: Senders, model_b: Path) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    senders.take(model_b, 41, corrupt=2)
    worker = OneWorker(stock)
    with WeightSync(
        weights_config(transport="ipc"), worker, senders, lambda kind, **facts: events.append((kind, facts))
    ) as sync:
        sync.push()
    assert [kind for kind, _ in events] == ["weights_transport", "weights_unverified"]
    assert "r3_provenance" in events[1][1]["reason"]
