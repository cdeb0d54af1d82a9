"""SGLang serves Mixtral: the reference's log-probs and experts, before and after an update of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3.types import ModelSpec
from tests.engines import reference
from tests.engines.test_sglang import assert_same_experts, buckets, generate, requests
from tests.megatron.toys import write_mixtral
from tests.real_engine import Host, engine_config, running

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("mixtral")
    return write_mixtral(directory / "a"), write_mixtral(directory / "b", seed=1)


@pytest.fixture(scope="module")
def worker(ray_session: None, models: tuple[Path, Path]) -> Iterator[Callable[..., Any]]:
    with running(Host, engine_config(), models[0]) as call:
        yield call


def assert_samples(worker: Callable[..., Any], model: Path, seed: int) -> None:
    answers = generate(worker, requests(12, seed=seed))
    for answer in answers:
        assert answer.routing.rows == len(answer.tokens) - 1
        answer.routing.verify(answer.tokens)
        expected = reference.logprobs(reference.forward(model, answer.tokens), answer.tokens, answer.prompt_len, 1.0)
        np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4, rtol=0)
    assert_same_experts(model, answers)


def test_log_probs_and_experts_follow_the_weights(worker: Callable[..., Any], models: tuple[Path, Path]) -> None:
    assert worker("call", "spec").model == ModelSpec.from_directory(models[0])
    assert_samples(worker, models[0], seed=1)
    import ray

    assert worker("call", "load_weights", ray.put(buckets(models[1], 1, 40))) > 0
    assert_samples(worker, models[1], seed=2)
