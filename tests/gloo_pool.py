"""Two processes that joined over gloo once and then run one test function after another."""

from __future__ import annotations

import gc
import itertools
import multiprocessing as mp
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from r3.config import TrainerConfig
from tests.megatron.release import release_models

TIMEOUT_S = 300.0
# Shorter, so that a rank that waits for a failed one answers too.
COLLECTIVE_TIMEOUT_S = 120.0
# In a rank: the store that all ranks share, and a name per rendezvous.
_shared: list[Any] = []
_meetings = itertools.count()


class GlooPool:
    """A context manager; `run(function, *args)` calls the picklable `function(*args)` in every rank at once.

    The ranks have joined Megatron's parallel state as data-parallel ranks, so a function may use it and collectives.
    """

    def __init__(self, world: int = 2) -> None:
        context = mp.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        self._lost: str | None = None
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        # Rank 0 opens the rendezvous, the others are told where.
        _, address = self._receive(0)
        for pipe in self._pipes:
            pipe.send(address)
        self._receive_all()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what `function` returned in each rank, by rank; an error in any of them is raised here.

        After a rank that gave no answer, every further call fails at once: the ranks are no longer in step.
        """
        if self._lost is not None:
            raise RuntimeError(f"the gloo pool is lost: {self._lost}")
        for pipe in self._pipes:
            pipe.send((function, args))
        return self._receive_all()

    def __enter__(self) -> GlooPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()

    def _receive_all(self) -> list[Any]:
        # Every answer is taken before an error is raised, or it would be the next call's.
        answers = [self._receive(rank) for rank in range(len(self._pipes))]
        failed = [
            f"rank {rank} of the gloo pool failed:\n{value}" for rank, (ok, value) in enumerate(answers) if not ok
        ]
        if failed:
            raise RuntimeError("\n".join(failed))
        return [value for _, value in answers]

    def _receive(self, rank: int) -> tuple[bool, Any]:
        if not self._pipes[rank].poll(TIMEOUT_S):
            self._lost = f"rank {rank} gave no answer within {TIMEOUT_S:g} s"
            raise TimeoutError(self._lost)
        answer: tuple[bool, Any] = self._pipes[rank].recv()
        return answer


@contextmanager
def arranged(layout: TrainerConfig) -> Iterator[None]:
    """Give the joined ranks another layout for a while; collective. Data parallel alone comes back behind it.

    The process groups are made anew each time: those of a layout that is gone would keep their threads, hundreds of
    them after a few dozen layouts.
    """
    _rejoin(layout)
    try:
        yield
    finally:
        _rejoin(None)


def _rejoin(layout: TrainerConfig | None) -> None:
    import torch.distributed as dist

    from r3.trainer import parallel

    rank, world = dist.get_rank(), dist.get_world_size()
    parallel.leave()
    gc.collect()
    store = dist.PrefixStore(f"meeting-{next(_meetings)}", _shared[0]) if world > 1 else dist.HashStore()
    parallel.join(store, rank, world, seed=0, timeout_s=COLLECTIVE_TIMEOUT_S, layout=layout)


def _serve(rank: int, world: int, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    from r3.trainer import parallel, worker  # noqa: F401 - everything large, before it is frozen

    torch.set_num_threads(1)
    # The collector runs several times a test, and would walk through a million objects of libraries each time.
    gc.collect()
    gc.freeze()
    store: dist.Store | None = None
    if rank == 0:
        store, _ = parallel.open_store(world)
        pipe.send((True, ("127.0.0.1", store.port)))
    host, port = pipe.recv()
    store = store or dist.TCPStore(host, port, world, is_master=False)
    _shared.append(store)
    parallel.join(store, rank, world, seed=0, timeout_s=COLLECTIVE_TIMEOUT_S)
    pipe.send((True, None))
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args)))
        except Exception:  # noqa: BLE001 - whatever it was, the test that asked must see it
            pipe.send((False, traceback.format_exc()))
        release_models()
