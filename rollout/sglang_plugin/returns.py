"""How rows leave the scheduler: a thread gathers them into shared memory, and only a ticket travels with the answer.

What costs throughput in SGLang's own way is not the copy but the wait for it: when a request finishes, its KV slots are
read from the device's table, which stops the scheduler until the pass under way has let go of that table, and the next
pass is launched late. Here the read is queued on the scheduler's stream like any other work, and a thread waits for it.

Why the rows are the same: the read is in the same place in the stream's order as SGLang's own, before the table's next
change. The rows that it names may be written again once their slots are given to another request, by a pass that is
launched later; before the rows of a pass are stored, the jobs that were there when it was launched are awaited
(`settle`). They never wait for that pass, so nothing can deadlock, and hardly ever is there anything to wait for.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from r3.rollout.segment import Slot, Ticket, Writer
from r3.rollout.sglang_plugin.rows import RowStore, SlotIds

logger = logging.getLogger(__name__)

# Bytes beside the rows: a stamp each of rows and tokens, and the weights that these name.
_STAMP, _WEIGHTS = 4, 4096
_SETTLE_S = 60.0

Statement = Callable[[SlotIds], bytes]


class Pending:
    """Numbers of a device tensor on their way to the host."""

    def __init__(self, source: Any) -> None:
        import torch

        self._event: Any = None
        if source.is_cuda:
            # A copy into memory that is not pinned would wait.
            self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._host.copy_(source, non_blocking=True)
            self._event = torch.cuda.Event(blocking=True)
            self._event.record()
        else:
            self._host = source.clone()

    def get(self) -> NDArray[np.int64]:
        """Wait for them, without the interpreter's lock, and return them."""
        if self._event is not None:
            self._event.synchronize()
        found: NDArray[np.int64] = self._host.numpy().astype(np.int64)
        return found


@dataclass(frozen=True, slots=True)
class _Job:
    slots: Pending
    place: Slot
    statement: Statement | None


class Returns:
    """Gathers rows of finished requests in a thread of its own, in the order in which they finished."""

    def __init__(self, store: RowStore, path: str) -> None:
        """Map the segment at `path` and take its memory; raise `RoutingError` or `OSError`."""
        self._store = store
        self._writer = Writer(path)
        self._writer.touch()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.submitted = 0
        self._done = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="r3-returns", daemon=True)
        self._thread.start()

    def submit(self, slots: Any, tokens: int, statement: Statement | None) -> Ticket | None:
        """Queue the rows of a finished request, whose KV slots are the device tensor `slots` `[rows]`.

        `statement` makes of those slots what travels beside the rows, for `tokens` sampled tokens. Returns None when
        the segment has no room.
        """
        rows = int(slots.shape[0])
        trailer = _WEIGHTS + _STAMP * (rows + tokens) if statement is not None else 0
        place = self._writer.allocate(rows * self._store.row_bytes, trailer)
        if place is None:
            return None
        self.submitted += 1
        self._jobs.put(_Job(Pending(slots), place, statement))
        return place.ticket

    def settle(self, submitted: int) -> None:
        """Wait until the first `submitted` jobs have read their rows, so that these may be written again."""
        if self._done >= submitted:
            return
        with self._changed:
            if not self._changed.wait_for(lambda: self._done >= submitted, _SETTLE_S):
                raise RuntimeError(f"rows of {submitted - self._done} finished requests were not read in {_SETTLE_S} s")

    def stop(self) -> None:
        """Finish what is queued and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._gather(job)
            except Exception as error:  # whatever it is, the reader is told and the scheduler must not wait for ever
                logger.exception("r3_provenance: rows of a finished request were not returned")
                job.place.fail(f"{type(error).__name__}: {error}")
            with self._changed:
                self._done += 1
                self._changed.notify_all()

    def _gather(self, job: _Job) -> None:
        slots = job.slots.get()
        unsound = self._store.take(slots, job.place.data)
        if unsound:
            job.place.fail(
                f"{unsound} of {len(slots)} rows came from passes with an expert id outside "
                f"[0, {self._store.num_experts}): physical ids, or padding"
            )
            return
        job.place.publish(b"" if job.statement is None else job.statement(slots))
