"""The driver's handle on the rollout workers: dispatch, time-outs and replacement. Only this and `deaths` here use Ray.

The driver sees small reports and object references; tokens, log-probs and routing stay in the object store, where the
trainer ranks map them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from r3.config import Config
from r3.errors import EngineError
from r3.rollout.deaths import DEATHS, WorkerDied, first_line, raise_cause, settle
from r3.rollout.engine import EngineSpec
from r3.rollout.gpus import visible_gpus
from r3.rollout.outcome import Rollout
from r3.rollout.reports import CanaryReport, EvalReport, RolloutReport
from r3.rollout.worker import RolloutWorker
from r3.transport import BatchRef, BlockRef, split
from r3.types import Prompt, layer_blocks
from r3.weights import Site

_CLOSE_TIMEOUT_S = 30.0


class Actor:
    """`RolloutWorker` behind Ray. The engine starts in a call, not the constructor, so its errors keep their type."""

    def __init__(self, config: Config, model_dir: str, index: int) -> None:
        self._arguments = (config, model_dir, index)
        self._worker: RolloutWorker | None = None

    def start(self) -> EngineSpec:
        """Start the worker and describe its engine."""
        self._worker = RolloutWorker(*self._arguments)
        return self._worker.spec()

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the worker; object references among the arguments have been resolved by Ray."""
        assert self._worker is not None
        return getattr(self._worker, method)(*arguments)

    def produce(self, method: str, blocks: int, *arguments: Any) -> tuple[Any, ...]:
        """Call a method that returns a report and a `Batch`; return report, core and every block as values apart.

        `blocks`: their number, which a batch without a single record lacks.
        """
        report, batch = self.call(method, *arguments)
        return report, *split(batch, blocks)

    def site(self) -> Site:
        """Say where this process stands; a CPU engine sees no GPU."""
        on_gpu = self._arguments[0].rollout.gpus_per_worker > 0
        return Site(ray.get_runtime_context().get_node_id(), visible_gpus() if on_gpu else ())

    def close(self) -> None:
        """Stop the engine, if one was started."""
        if self._worker is not None:
            self._worker.close()


@dataclass(frozen=True, slots=True)
class _Job:
    """A call for one worker, kept so that it can be issued again to the worker's replacement.

    `blocks`: of a method that returns a report and a `Batch`, in how many blocks its records are.
    """

    worker: int
    method: str
    arguments: tuple[Any, ...]
    blocks: int | None = None


class RolloutPool:
    """All rollout workers of a run; a context manager that stops them."""

    def __init__(
        self,
        config: Config,
        model_dir: str | Path,
        on_event: Callable[..., None] = lambda kind, **facts: None,
        place: PlacementGroup | None = None,
    ) -> None:
        """Start every worker; `on_event(kind, **facts)` is told of deaths, replacements and dropped samples.

        `place` has a bundle per worker (`r3.cluster.Places`); without it Ray chooses.
        Raises `EngineError` when one does not start in `rollout.start_timeout_s`, and what its engine raised.
        """
        self._config = config
        self._model_dir = str(model_dir)
        self._place = place
        self._on_event = on_event
        self._failures = 0
        # Gives a replaced worker the current weights; whoever brings weights sets it.
        self.reload: Callable[[int], None] | None = None
        self._actors: list[ActorHandle] = []
        try:
            self._actors = [self._new_actor(index) for index in range(config.rollout.workers)]
            starts = [actor.start.remote() for actor in self._actors]
            deadline = time.monotonic() + config.rollout.start_timeout_s
            self._specs = [self._started(index, start, deadline) for index, start in enumerate(starts)]
        except DEATHS as error:
            self.close()
            raise EngineError(f"a rollout worker died while it started its engine: {first_line(error)}") from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def spec(self) -> EngineSpec:
        """Describe the engine of the first worker."""
        return self._specs[0]

    def specs(self) -> list[EngineSpec]:
        """Describe every worker's engine: they have one config, but may stand on different hosts."""
        return list(self._specs)

    def describe_engines(self) -> list[str]:
        """Return one line per kind of worker: how many, their engine, who wrote their rows and how these come back."""
        kinds = Counter(f"{spec.engine}, {spec.describe_rows()}" for spec in self._specs)
        return [f"{count} x {kind}" for kind, count in kinds.items()]

    def generate(self, prompts: Sequence[Prompt], step: int) -> Rollout:
        """Answer every prompt `grpo.group_size` times; prompt i is group i, workers take contiguous shares.

        Raises `EngineError` for a time-out, for too many dead workers and when no sample is usable; `RoutingError` as
        the worker raised it.
        """
        size = self._config.grpo.group_size
        jobs = [
            _Job(worker, "generate", (tuple(prompts[begin:end]), begin, size, step), len(self._blocks()))
            for worker, (begin, end) in enumerate(_shares(len(prompts), len(self._actors)))
            if end > begin
        ]
        outcomes: list[tuple[RolloutReport, BatchRef]] = [
            (report, self._batch(references)) for report, references in self._run(jobs)
        ]
        rollout = Rollout.of(outcomes)
        self._announce(step, rollout, [report for report, _ in outcomes])
        if not rollout.facts:
            dropped = rollout.dropped_samples
            raise EngineError(f"step {step}: none of {len(dropped)} samples is usable; first: {dropped[0].reason}")
        return rollout

    def evaluate(self, prompts: Sequence[Prompt]) -> list[float]:
        """Return the rewards of greedy answers, in the order of the prompts. No routing is recorded."""
        jobs = [
            _Job(worker, "evaluate", (tuple(prompts[begin:end]),))
            for worker, (begin, end) in enumerate(_shares(len(prompts), len(self._actors)))
            if end > begin
        ]
        reports: list[EvalReport] = [report for report, _ in self._run(jobs)]
        return [reward for report in reports for reward in report.rewards]

    def canary(self, prompts: Sequence[Prompt]) -> BatchRef:
        """Let every worker prove its capture; return the first one's batch of sampled answers for an audit."""
        blocks = len(self._blocks())
        jobs = [_Job(worker, "canary", (tuple(prompts),), blocks) for worker in range(len(self._actors))]
        outcomes = self._run(jobs)
        for worker, (report, _) in enumerate(outcomes):
            assert isinstance(report, CanaryReport)
            self._on_event("rollout_canary", worker=worker, **asdict(report))
        return self._batch(outcomes[0][1])

    def load_weights(self, weights: ObjectRef) -> float:
        """Load the `WeightBuckets` behind a reference into every engine; return the slowest worker's seconds."""

        def again(worker: int) -> None:
            self.call("load_weights", {worker: (weights,)})

        self.reload = again
        jobs = [_Job(worker, "load_weights", (weights,)) for worker in range(len(self._actors))]
        return max(float(seconds) for seconds, _ in self._run(jobs))

    def sites(self) -> list[Site]:
        """Return where every worker stands."""
        limit = self._config.rollout.timeout_s
        deadline, found = time.monotonic() + limit, []
        for worker, call in enumerate([actor.site.remote() for actor in self._actors]):
            try:
                found.append(ray.get(call, timeout=max(0.0, deadline - time.monotonic())))
            except GetTimeoutError:
                raise EngineError(f"rollout worker {worker} did not say within {limit:g} s where it is") from None
            except DEATHS as error:
                raise EngineError(f"rollout worker {worker} died before it said where it is: {error}") from error
            except RayTaskError as error:
                raise_cause(error, worker, "site")
        return found

    def call(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Call a method of some workers, each with its own arguments, side by side; return what each returns.

        Raises `WorkerDied` at the first death, whichever worker waits for the dead one; the caller is to `replace` it.
        """
        deadline = time.monotonic() + self._config.rollout.timeout_s
        pending = {self._actors[worker].call.remote(method, *given): worker for worker, given in arguments.items()}
        found: dict[int, Any] = {}
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                self._give_up(list(pending.values()), method)
            worker = pending.pop(done[0])
            try:
                found[worker] = ray.get(done[0])
            except DEATHS as error:
                self._require_own_death(worker, method, error)
                returned, died = settle(pending)
                raise WorkerDied(worker, error, returned | found.keys(), died) from error
            except RayTaskError as error:
                # It may have met what the death of another one left, such as a group without that peer.
                returned, died = settle(pending)
                for dead, cause in died.items():
                    raise WorkerDied(dead, cause, returned | found.keys(), died) from cause
                raise_cause(error, worker, method)
        return {worker: found[worker] for worker in arguments}

    def replace(self, death: WorkerDied) -> None:
        """Replace a worker that died in `call` and those that it `blocked`, without loading weights.

        Raises `EngineError` after too many deaths; a worker that was blocked has not died.
        """
        for worker in death.blocked:
            self._on_event("rollout_worker_blocked", worker=worker, by=death.worker)
            ray.kill(self._actors[worker])
        self._replace(death.worker, death.cause, reload=None)
        for worker in death.blocked:
            self._renew(worker, reload=None)

    def close(self) -> None:
        """Stop every engine and actor. Safe to call twice; an actor that does not answer is killed."""
        actors, self._actors = self._actors, []
        if not ray.is_initialized():
            return
        closing = [actor.close.remote() for actor in actors]
        ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_TIMEOUT_S) if closing else None
        for actor in actors:
            ray.kill(actor)

    def _announce(self, step: int, rollout: Rollout, reports: Sequence[RolloutReport]) -> None:
        """Tell of what is in no batch, goes without a record or came back otherwise than hoped for."""
        for kind, samples in (("samples_dropped", rollout.dropped_samples), ("samples_native", rollout.native_samples)):
            if samples:
                self._on_event(kind, step=step, count=len(samples), first=samples[0].reason)
        if rollout.stale_rows:
            first = next(report.first_stale for report in reports if report.first_stale)
            self._on_event("stale_rows", step=step, count=rollout.stale_rows, first=first)
        unshared = sum(report.unshared_records for report in reports)
        if unshared:
            size = self._config.routing.shared_mib
            self._on_event("rows_not_shared", step=step, count=unshared, fix=f"raise routing.shared_mib (now {size})")

    def _run(self, jobs: Sequence[_Job]) -> list[tuple[Any, list[ObjectRef]]]:
        """Run the jobs side by side; return of each the first value, and references to the others, in order."""
        issued = [self._issue(job) for job in jobs]
        results = []
        for job, (references, deadline) in zip(jobs, issued, strict=True):
            while True:
                try:
                    value = ray.get(references[0], timeout=max(0.0, deadline - time.monotonic()))
                    break
                except DEATHS as error:
                    self._require_own_death(job.worker, job.method, error)
                    self._replace(job.worker, error, self.reload)
                    references, deadline = self._issue(job)
                except GetTimeoutError:
                    self._give_up([job.worker], job.method)
                except RayTaskError as error:
                    raise_cause(error, job.worker, job.method)
            results.append((value, references[1:]))
        return results

    def _issue(self, job: _Job) -> tuple[list[ObjectRef], float]:
        actor, deadline = self._actors[job.worker], time.monotonic() + self._config.rollout.timeout_s
        if job.blocks is None:
            return [actor.call.remote(job.method, *job.arguments)], deadline
        # Report, core and blocks: a reader fetches what it needs of them.
        call = actor.produce.options(num_returns=2 + job.blocks)
        return call.remote(job.method, job.blocks, *job.arguments), deadline

    def _blocks(self) -> tuple[tuple[int, ...], ...]:
        """Return the MoE layers of every block of a record; none without capture."""
        routing = self._config.routing
        return layer_blocks(self.spec().model.moe_layers, self._config.block_layers) if routing.capture else ()

    def _batch(self, references: Sequence[ObjectRef]) -> BatchRef:
        return BatchRef(references[0], tuple(map(BlockRef, self._blocks(), references[1:])))

    def _give_up(self, workers: Sequence[int], method: str) -> NoReturn:
        """End workers that do not answer, or `close` would wait for the same call, and raise `EngineError`."""
        for worker in workers:
            ray.kill(self._actors[worker])
        raise EngineError(
            f"rollout worker {', '.join(map(str, workers))} did not answer `{method}` within "
            f"{self._config.rollout.timeout_s:g} s (rollout.timeout_s)"
        ) from None

    def _require_own_death(self, worker: int, method: str, error: BaseException) -> None:
        """A call also fails when the maker of one of its arguments has died; that is no worker to replace."""
        died = getattr(error, "actor_id", None)
        if died is not None and died != self._actors[worker]._actor_id.hex():
            raise EngineError(f"`{method}` got an argument whose maker has died: {first_line(error)}") from error

    def _replace(self, index: int, error: BaseException, reload: Callable[[int], None] | None) -> None:
        """Replace a dead worker and `reload` the new one's weights; raise once too many have died."""
        self._failures += 1
        reason = first_line(error)
        self._on_event("rollout_worker_died", worker=index, failures=self._failures, reason=reason)
        if self._failures > self._config.rollout.max_failures:
            raise EngineError(
                f"rollout worker {index} died ({reason}); it is death {self._failures} of this run, "
                f"rollout.max_failures is {self._config.rollout.max_failures}"
            ) from error
        self._renew(index, reload)

    def _renew(self, index: int, reload: Callable[[int], None] | None) -> None:
        begin = time.monotonic()
        ray.kill(self._actors[index])  # frees its place even where only the engine under it is gone
        self._actors[index] = self._new_actor(index)
        deadline = begin + self._config.rollout.start_timeout_s
        try:
            before, now = self._specs[index], self._started(index, self._actors[index].start.remote(), deadline)
            self._specs[index] = now
            if (now.describe_rows(), now.unverified) != (before.describe_rows(), before.unverified):
                self._on_event(
                    "rollout_worker_changed", worker=index, rows=now.describe_rows(), unverified=now.unverified
                )
            if reload is not None:
                reload(index)
        except DEATHS as again:
            self._replace(index, again, reload)
            return
        except WorkerDied as again:
            self._replace(index, again.cause, reload)
            return
        self._on_event("rollout_worker_replaced", worker=index, seconds=time.monotonic() - begin)

    def _new_actor(self, index: int) -> ActorHandle:
        options = ray.remote(Actor).options(
            name=None,
            num_cpus=1,
            num_gpus=self._config.rollout.gpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._place, index) if self._place else None,
        )
        return options.remote(self._config, self._model_dir, index)

    def _started(self, index: int, start: ObjectRef, deadline: float) -> EngineSpec:
        try:
            spec: EngineSpec = ray.get(start, timeout=max(0.0, deadline - time.monotonic()))
            return spec
        except GetTimeoutError:
            ray.kill(self._actors[index])
            raise EngineError(
                f"rollout worker {index} did not start within {self._config.rollout.start_timeout_s:g} s "
                "(rollout.start_timeout_s); is its CPU and GPU free in the cluster?"
            ) from None
        except RayTaskError as error:
            raise_cause(error, index, "start")


def _shares(items: int, workers: int) -> list[tuple[int, int]]:
    """Cut `range(items)` into one contiguous `(begin, end)` per worker, sizes differing by at most one."""
    return list(pairwise(worker * items // workers for worker in range(workers + 1)))
