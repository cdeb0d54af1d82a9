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
    import ray

    from tests.real_engine import StampingHost, engine_config

    arguments = {
        "disable_overlap_schedule": request.param == "no overlap",
        "chunked_prefill_size": CHUNK,
        # Admits far more than fits, so that running requests are retracted.
        "schedule_conservativeness": 0.01,
    }
    routing = {"provenance": "require", "shared_memory": "require", "shared_mib": 1}
    config = engine_config(routing=routing, max_total_tokens=SLOTS, engine_args=arguments)
    actor = ray.remote(StampingHost).options(num_cpus=1).remote(config, str(model_a), 0)

    def call(method: str, *arguments: Any, **options: Any) -> Any:
        return ray.get(getattr(actor, method).remote(*arguments, **options), timeout=300)

    call("start")
    yield call
    call("close")
    ray.kill(actor)
