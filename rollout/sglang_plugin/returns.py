"""How rows leave the scheduler: gathered into shared memory when nobody waits for it; a ticket travels with the answer.

What costs throughput in SGLang's own way is not the copy but the wait for it: when a request finishes, its KV slots are
read from the device's table, which stops the scheduler until the pass under way has let go of that table, and the next
pass is launched late. Here the read is queued on the scheduler's stream like any other work, and the rows are gathered
once it must be over: before the rows of a pass are stored that was launched behind it (`settle`), or when the engine
pauses or idles (`finish`). A thread would have to share the interpreter's lock with a scheduler that never sleeps.

Why the rows are the same: the read is in the same place in the stream's order as SGLang's own, before the table's next
change. The rows that it names may be written again once their slots belong to another request, by a pass that is
launched later, and before that pass's rows are stored these are gathered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from r3.rollout.segment import Slot, Ticket, Writer
from r3.rollout.sglang_plugin.rows import RowStore, SlotIds

# Bytes beside the rows: a stamp each of rows and tokens, and the weights that these name.
_STAMP, _WEIGHTS = 4, 4096

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
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = source.clone()

    def get(self) -> NDArray[np.int64]:
        """Return them; wait where they are still on their way."""
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
    """Gathers rows of finished requests in the order in which they finished; used from the scheduler's one thread."""

    def __init__(self, store: RowStore, path: str) -> None:
        """Map the segment at `path`; raise `RoutingError` or `OSError`."""
        self._store = store
        self._writer = Writer(path)
        self._writer.touch()
        self._jobs: deque[_Job] = deque()
        self._done = 0

    @property
    def submitted(self) -> int:
        """How many finished requests were queued so far."""
        return self._done + len(self._jobs)

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
        self._jobs.append(_Job(Pending(slots), place, statement))
        return place.ticket

    def settle(self, submitted: int) -> None:
        """Gather the rows of the first `submitted` requests, so that their slots may be written again."""
        while self._done < submitted and self._jobs:
            job = self._jobs.popleft()
            self._done += 1
            self._gather(job)

    def finish(self) -> None:
        """Gather everything that is queued."""
        self.settle(self.submitted)

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
