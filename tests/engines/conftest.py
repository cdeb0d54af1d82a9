"""The engine that the contract and provenance tests share: the plugin, prefills in chunks, KV that must retract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHUNK, SLOTS = 32, 2048


@pytest.fixture(scope="session", params=["overlap", pytest.param("no overlap", marks=pytest.mark.slow)])
def stamping(ray_session: None, model_a: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Return a function that calls a method of `StampingHost`; the engine runs with and without overlap scheduling."""
    from tests.real_engine import StampingHost, engine_config, running

    arguments = {
        "disable_overlap_schedule": request.param == "no overlap",
        "chunked_prefill_size": CHUNK,
        # Admits far more than fits, so that running requests are retracted.
        "schedule_conservativeness": 0.01,
    }
    routing = {"provenance": "require", "shared_memory": "require", "shared_mib": 1}
    config = engine_config(routing=routing, max_total_tokens=SLOTS, engine_args=arguments)
    with running(StampingHost, config, model_a) as call:
        yield call


@pytest.fixture
def stock(ray_session: None, model_a: Path) -> Iterator[Callable[..., Any]]:
    """The same of an engine without the plugin, whether this package is installed or not."""
    from tests.real_engine import StockHost, engine_config, running

    with running(StockHost, engine_config(), model_a) as call:
        yield call
