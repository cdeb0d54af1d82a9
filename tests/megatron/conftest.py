"""Fixtures of the trainer's tests: checkpoints, a one-rank parallel state, one pool of two gloo processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.gloo_pool import GlooPool
from tests.megatron.release import release_models

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with untied embeddings."""
    from tests.megatron.toys import write_model

    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def _no_model_stays() -> Iterator[None]:
    yield
    release_models()


@pytest.fixture
def single_rank() -> Iterator[None]:
    """Megatron's parallel state with this process as the only rank."""
    from r3.trainer import parallel

    parallel.join(dist.HashStore(), 0, 1, seed=0, timeout_s=60)
    yield
    parallel.leave()


@pytest.fixture(scope="session")
def gloo_pool() -> Iterator[GlooPool]:
    """Two gloo ranks, started once."""
    with GlooPool(2) as pool:
        yield pool
