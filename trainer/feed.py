"""Microbatches that are laid out when a pass first asks for them, while a GPU works on the one before."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import overload

from r3.trainer.batching import Form, MicroBatch, StepBatch, microbatch
from r3.trainer.parallel import host_array
from r3.trainer.records import DeferredChecks
from r3.types import ModelSpec


class MicroBatches(Sequence[MicroBatch]):
    """The microbatches of `samples` (of each, those of `step`), kept once they are made.

    `shape`: rows and length of the largest; `seconds`: spent on making them so far. `checks` of their records' content
    come behind, to be finished before anything is trained on them; making one raises `RoutingError` for a record whose
    form is wrong.
    """

    def __init__(self, step: StepBatch, samples: Sequence[Sequence[int]], spec: ModelSpec, form: Form) -> None:
        self._step, self._samples, self._spec, self._form = step, samples, spec, form
        self._made: list[MicroBatch | None] = [None] * len(samples)
        shapes = [form.shape([len(step.trajectories[i].tokens) for i in part]) for part in samples]
        self.shape = max(rows for rows, _ in shapes), max(length for _, length in shapes)
        self.checks = DeferredChecks()
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> MicroBatch: ...

    @overload
    def __getitem__(self, index: slice) -> list[MicroBatch]: ...

    def __getitem__(self, index: int | slice) -> MicroBatch | list[MicroBatch]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        found = self._made[index]
        if found is None:
            begin = time.perf_counter()
            found = microbatch(self._step, self._samples[index], self._spec, self._form, self.checks, host_array)
            self._made[index] = found
            self.seconds += time.perf_counter() - begin
        return found


@dataclass(frozen=True, slots=True)
class StepShare:
    """A step's batch and the part of it that this rank works on; `sizes`: microbatches of each mini-step.

    `planned_s`: spent before the first microbatch was laid out.
    """

    step: StepBatch
    microbatches: MicroBatches
    sizes: tuple[int, ...]
    planned_s: float

    @property
    def mini_steps(self) -> list[list[MicroBatch]]:
        """The microbatches by mini-step."""
        ends = list(accumulate(self.sizes))
        return [self.microbatches[end - size : end] for size, end in zip(self.sizes, ends, strict=True)]

    @property
    def seconds(self) -> float:
        """Spent so far on bringing the records into microbatches."""
        return self.planned_s + self.microbatches.seconds


def finish_checks(microbatches: Sequence[MicroBatch]) -> None:
    """Check what is left of their records, for when a pass over them has given the device all of its work."""
    if isinstance(microbatches, MicroBatches):
        microbatches.checks.finish()


def largest_shape(microbatches: Sequence[MicroBatch]) -> tuple[int, int]:
    """Return the largest number of rows and the largest length of some microbatches, without making any."""
    if isinstance(microbatches, MicroBatches):
        return microbatches.shape
    return max(one.shape[0] for one in microbatches), max(one.shape[1] for one in microbatches)
