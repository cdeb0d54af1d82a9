"""Tests that need a CUDA device; without one they are skipped: `pytest -m gpu tests/gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(item.path).parent == Path(__file__).parent]
    if not here:
        return
    import torch

    for item in here:
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint whose shapes SGLang's prebuilt kernels take."""
    from tests.megatron.toys import SIZES_FOR_KERNELS, write_model

    return write_model(tmp_path_factory.mktemp("models") / "small", **SIZES_FOR_KERNELS)


@pytest.fixture
def single_rank() -> Iterator[None]:
    """Megatron's parallel state with this process, on its GPU, as the only rank."""
    import torch.distributed as dist

    from r3.trainer import parallel

    parallel.join(dist.HashStore(), 0, 1, seed=0, timeout_s=120)
    yield
    parallel.leave()
