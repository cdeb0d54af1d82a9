"""Rows in shared memory, looked at while the engine still generates for other requests.

An engine in process returns the answers of a batch together, and this process has nothing to do until then. What of a
check needs rows alone is most of it; behind the last answer the engine would wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from types import TracebackType

from r3.rollout.segment import Bytes, Owner, Ticket
from r3.routing import RowsSeen, expert_dtype, see_rows
from r3.types import ModelSpec

_POLL_S = 0.005


class EarlyLook:
    """Looks, in a thread, at records of `owner` that become ready in a `with` block, which yields what it found.

    That is, by ticket, what `see_rows` says of a record's rows. Of a record that is wrong nothing is said: who reads it
    finds out why.
    """

    def __init__(self, owner: Owner, model: ModelSpec) -> None:
        self._owner, self._model = owner, model
        self._stop = Event()
        self._sound: dict[Ticket, RowsSeen] = {}

    def __enter__(self) -> Mapping[Ticket, RowsSeen]:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="r3-early-look")
        self._running = self._threads.submit(self._run)
        return self._sound

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._threads.shutdown()
        self._running.result()

    def _run(self) -> None:
        while not self._stop.is_set():
            for ticket, data in self._owner.look_ahead():
                self._look(ticket, data)
                if self._stop.is_set():
                    return
            self._stop.wait(_POLL_S)

    def _look(self, ticket: Ticket, data: Bytes) -> None:
        dtype, model = expert_dtype(self._model.num_experts), self._model
        row = model.num_layers * model.top_k * dtype.itemsize
        if len(data) % row:
            return
        rows = data.view(dtype).reshape(-1, model.num_layers, model.top_k)
        seen = see_rows(rows, model.num_experts)
        if seen is not None:
            self._sound[ticket] = seen
