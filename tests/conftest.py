"""What the whole test session shares: start-up dominates, so there is one Ray cluster, one engine and one gloo pool."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is no failure: nothing that a test asserts depends on time.
settings.register_profile("r3", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("r3")
# Before anything imports torch: more threads than cores slow small models down many times over.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("WANDB_MODE", "offline")


def pytest_collection_finish() -> None:
    """Take what the test modules imported out of the collector's sight; tests that collect would walk through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A private local Ray cluster with room for every actor of a test."""
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def warm_model() -> Path:
    """The built-in model after its warm start, made once per machine (about a minute) and cached."""
    from r3.builtin import resolve_model

    return resolve_model("builtin:tiny-qwen3moe", target_reward=0.35, seed=0)


@pytest.fixture(scope="session")
def model_a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint, the one that the session's engine starts with."""
    from tests.tiny_model import write_model

    return write_model(tmp_path_factory.mktemp("a"), seed=0)


@pytest.fixture(scope="session")
def model_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another checkpoint of the same shape."""
    from tests.tiny_model import write_model

    return write_model(tmp_path_factory.mktemp("b"), seed=1)


@pytest.fixture(scope="session")
def sglang_worker(ray_session: None, model_a: Path) -> Iterator[Callable[..., Any]]:
    """Return a function `(method, *args, **kwargs)` that calls a method of `Host` and waits for its value."""
    from tests.real_engine import Host, engine_config, running

    with running(Host, engine_config(), model_a) as call:
        yield call
