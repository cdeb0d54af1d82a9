"""What the driver learns of a push when a trainer rank fails in it; the ranks have no model."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from r3.errors import CheckpointError, EngineError
from r3.trainer import port
from r3.trainer.port import OutletPort

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


class Rank:
    """Stands for `TrainerRank`: `fill` never ends, as a receive over NCCL does whose peer is gone."""

    def __init__(self, fault: Callable[[], None]) -> None:
        self._fault = fault

    def weights(self, method: str, *_: Any) -> int:
        if method == "fill":
            threading.Event().wait()
        if method == "send_parts":
            self._fault()
        return 7


def refuse() -> None:
    raise CheckpointError("a shard is broken")


def die() -> None:
    os._exit(1)


@pytest.fixture
def open_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], None]], OutletPort]]:
    monkeypatch.setattr(port, "_SETTLE_S", 0.1)
    made: list[Any] = []

    def start(fault: Callable[[], None]) -> OutletPort:
        made.extend(ray.remote(Rank).options(num_cpus=0).remote(fault) for _ in range(2))
        return OutletPort(made, timeout_s=120)

    yield start
    for rank in made:
        ray.kill(rank)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [(refuse, CheckpointError, "a shard is broken"), (die, EngineError, "trainer rank 1 died in '(open|fill)'")],
)
def test_rank_0_is_not_waited_for_once_a_sender_failed(
    open_port: Callable[[Callable[[], None]], OutletPort],
    fault: Callable[[], None],
    kind: type[Exception],
    message: str,
) -> None:
    ranks = open_port(fault)
    with pytest.raises(kind, match=message):
        _ = ranks.open(shared=False), ranks.fill(-1, 0).wait()


def test_senders_that_are_done_early_are_no_failure(
    open_port: Callable[[Callable[[], None]], OutletPort],
) -> None:
    ranks = open_port(int)
    assert ranks.open(shared=False) == 7
    assert ranks.close() == 7
