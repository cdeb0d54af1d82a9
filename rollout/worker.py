"""The rollout worker: one engine, its tokenizer and the task's verifier; `r3.rollout.pool` makes it an actor."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from r3.config import Config, RoutingConfig
from r3.errors import EngineError, RoutingError
from r3.rollout.engine import (
    EngineSpec,
    Generation,
    Request,
    Sampling,
    StreamedEngine,
    check_generation,
    open_engine,
    stop_token_ids,
)
from r3.rollout.policies import fate
from r3.rollout.provenance import OnStale, count, describe, settle
from r3.rollout.reports import CanaryReport, Dropped, EvalReport, Native, RolloutReport
from r3.routing import check_constant_layers
from r3.tasks import encode, open_task
from r3.types import Batch, Prompt, Trajectory, WeightVersion
from r3.weights import BroadcastGroup, WeightBuckets, WeightPart


@dataclass(frozen=True, slots=True)
class _Sample:
    """One request of a call and its place in the step."""

    prompt: Prompt
    group: int
    member: int
    request: Request

    def __str__(self) -> str:
        return f"prompt {self.prompt.index}, group {self.group}, member {self.member}"


@dataclass(slots=True)
class _Sorted:
    """The answers of one call by what becomes of them, in order; `found` are all of them."""

    found: list[Generation] = field(default_factory=list)
    kept: list[tuple[_Sample, Generation]] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    native: list[Native] = field(default_factory=list)
    check_seconds: float = 0.0


def prepare_environment(config: Config) -> None:
    """Set what must be set before torch is imported, in this process and those that the engine starts.

    On a CPU one OpenMP thread each: the trainer shares the cores, and spinning barriers cost 100x there. A CPU engine
    on a machine with a GPU must not see it.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not config.rollout.gpus_per_worker:
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


class RolloutWorker:
    """Generates, scores and packs. Every method *returns* what it makes: a returned object survives its worker."""

    def __init__(self, config: Config, model_dir: str, index: int) -> None:
        """Start the engine; raise `ConfigError` or `EngineError`."""
        prepare_environment(config)
        self._config = config
        self._task = open_task(config.task)
        self._stops = stop_token_ids(model_dir)
        self._engine = open_engine(config, model_dir, index)
        self._spec = self._engine.spec()
        self._tokenizer = _load_tokenizer(model_dir)
        self._loading = 0.0

    def spec(self) -> EngineSpec:
        """Describe the running engine."""
        return self._spec

    def generate(
        self, prompts: Sequence[Prompt], first_group: int, group_size: int, step: int = 0
    ) -> tuple[RolloutReport, Batch]:
        """Answer every prompt `group_size` times; prompt i is group `first_group + i`.

        The engine's random numbers are a function of `run.seed`, `step` and `first_group`, not of what came before.
        The batch holds the samples group by group, in order of their member number. Raises `RoutingError` for a bad
        record where `routing.on_error` or `routing.on_missing` say so, and for a layer that was not captured.
        """
        return self._generate(prompts, first_group, group_size, step, self._config.routing)

    def _generate(
        self, prompts: Sequence[Prompt], first_group: int, group_size: int, step: int, routing: RoutingConfig
    ) -> tuple[RolloutReport, Batch]:
        samples = self._samples(prompts, first_group, group_size)
        begin = time.perf_counter()
        sampling = self._training_sampling(_seed(self._config.run.seed, step, first_group))
        answers = self._engine.generate([s.request for s in samples], sampling, capture=routing.capture)
        made = self._sort(samples, answers, routing)
        generated = time.perf_counter()
        rewards = [self._score(sample.prompt, answer) for sample, answer in made.kept]
        scored = time.perf_counter()
        batch = self._pack(made.kept, rewards)
        packed = time.perf_counter()
        for block in batch.blocks:
            check_constant_layers(block.stored, block.layers, rows=batch.stored.rows)
        checked = made.check_seconds + time.perf_counter() - packed
        return RolloutReport(
            facts=batch.facts(),
            dropped=tuple(made.dropped),
            native=tuple(made.native),
            seconds=generated - begin,
            check_seconds=checked,
            score_seconds=scored - generated,
            pack_seconds=packed - scored,
            prompt_tokens=sum(answer.prompt_len for answer in made.found),
            response_tokens=sum(len(answer.logprobs) for answer in made.found),
            cached_tokens=sum(answer.cached_tokens for answer in made.found),
            routing_bytes=batch.routing_bytes,
            routing_rows=batch.stored.rows,
            stale_rows=sum(count(answer.stale) for answer in made.found),
            first_stale=next((describe(answer.stale) for answer in made.found if answer.stale), ""),
            unshared_records=self._unshared(made.found),
            weight_version=made.found[0].weight_version if made.found else 0,
        ), batch

    def _unshared(self, found: Sequence[Generation]) -> int:
        """Count records that came with their answers although there is shared memory for them."""
        wires = [answer.wire for answer in found if answer.wire is not None] if self._spec.shared_memory else []
        return sum(not wire.shared for wire in wires)

    def evaluate(self, prompts: Sequence[Prompt]) -> EvalReport:
        """Answer every prompt greedily, without routing, and return the rewards in order."""
        begin = time.perf_counter()
        requests = [self._request(prompt) for prompt in prompts]
        found = list(self._engine.generate(requests, self._greedy_sampling(), capture=False))
        for request, answer in zip(requests, found, strict=True):
            check_generation(request, answer, self._spec, capture=False)
        rewards = tuple(self._score(prompt, answer) for prompt, answer in zip(prompts, found, strict=True))
        return EvalReport(rewards, time.perf_counter() - begin)

    def canary(self, prompts: Sequence[Prompt]) -> tuple[CanaryReport, Batch]:
        """Prove the capture on a few prompts, and return a batch for the trainer to audit.

        Greedy answers to one prompt are made from an empty prefix cache, from a warm one, and in batches that mix both;
        they must carry the same prompt rows. The batch holds *sampled* answers, because greedy ones have log-probs at
        temperature 1, whatever the run's temperature. A missing or malformed record fails here under every policy.
        Raises `RoutingError`.
        """
        requests, half = [self._request(prompt) for prompt in prompts], len(prompts) // 2
        greedy = self._greedy_sampling()
        self._engine.flush_cache()
        first = self._captured(requests[:half], greedy)
        mixed = self._captured(requests, greedy)
        warm = self._captured(requests, greedy)
        report = compare(first + mixed[half:], mixed[:half] + warm[half:])
        report.require()
        strict = self._config.routing.model_copy(update={"on_error": "fail", "on_missing": "fail", "on_stale": "fail"})
        try:
            _, batch = self._generate(prompts, 0, 1, 0, strict)
        except RoutingError as error:
            raise type(error)(f"start-up canary: {error}") from error
        return report, batch

    def load_weights(self, weights: WeightBuckets) -> float:
        """Load new weights and return the seconds; the engine's cache is empty afterwards. Raises `EngineError`."""
        begin = time.perf_counter()
        self._engine.load_weights(weights, weights.version)
        return time.perf_counter() - begin

    def begin_weights(self, version: WeightVersion) -> None:
        """Begin an update whose buckets come one by one; see `StreamedEngine`, also for the next ones."""
        self._loading = 0.0
        self._timed("begin_weights", version)

    def load_part(self, part: WeightPart) -> None:
        """Load one bucket."""
        self._timed("load_part", part)

    def end_weights(self, checksums: Sequence[int]) -> float:
        """End the update; return the seconds that the engine took for all of it."""
        self._timed("end_weights", checksums)
        return self._loading

    def join_group(self, group: BroadcastGroup, offset: int) -> None:
        """Join a broadcast group."""
        self._timed("join_group", group, offset)

    def leave_group(self, name: str) -> None:
        """Leave a broadcast group."""
        self._timed("leave_group", name)

    def _timed(self, method: str, *arguments: Any) -> None:
        begin = time.perf_counter()
        engine = self._engine
        if not isinstance(engine, StreamedEngine):
            raise EngineError(f"{self._spec.engine} takes no weights bucket by bucket")
        getattr(engine, method)(*arguments)
        self._loading += time.perf_counter() - begin

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()

    def _training_sampling(self, seed: int) -> Sampling:
        rollout = self._config.rollout
        return Sampling(rollout.temperature, rollout.max_new_tokens, self._stops, seed=seed)

    def _greedy_sampling(self) -> Sampling:
        return Sampling(1.0, self._config.rollout.max_new_tokens, self._stops, greedy=True)

    def _samples(self, prompts: Sequence[Prompt], first_group: int, group_size: int) -> list[_Sample]:
        return [
            _Sample(prompt, first_group + i, member, request)
            for i, prompt in enumerate(prompts)
            for request in [self._request(prompt)]
            for member in range(group_size)
        ]

    def _request(self, prompt: Prompt) -> Request:
        tokens = encode(self._tokenizer, prompt)
        if not tokens:
            raise EngineError(f"prompt {prompt.index} has no tokens; an engine needs at least one")
        return Request(np.array(tokens, dtype=np.int32))

    def _sort(self, samples: Sequence[_Sample], answers: Iterable[Generation], routing: RoutingConfig) -> _Sorted:
        """Check every answer as it comes, and part those that are used from those that are not."""
        made = _Sorted()
        for sample, answer in zip(samples, answers, strict=True):
            begin = time.perf_counter()
            defect = check_generation(sample.request, answer, self._spec, capture=routing.capture)
            made.check_seconds += time.perf_counter() - begin + answer.decode_s
            made.found.append(answer)
            try:
                what, why = fate(answer, defect, routing)
            except RoutingError as error:
                raise type(error)(f"{sample}: {error}") from error
            if what == "drop":
                made.dropped.append(Dropped(sample.group, sample.member, why))
                continue
            if what == "native":
                made.native.append(Native(sample.group, sample.member, why))
                answer = replace(answer, routing=None)
            settled = _settle_stale(answer, str(sample), routing.on_stale)
            if settled is None:
                made.dropped.append(Dropped(sample.group, sample.member, f"stale rows: {describe(answer.stale)}"))
            else:
                made.kept.append((sample, settled))
        return made

    def _captured(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        found = list(self._engine.generate(requests, sampling, capture=True))
        for request, answer in zip(requests, found, strict=True):
            defect = check_generation(request, answer, self._spec, capture=True)
            if defect is not None:
                raise type(defect)(f"start-up canary: {defect}")
            if answer.routing is None:
                raise RoutingError("start-up canary: an answer was aborted by the engine")
        return found

    def _score(self, prompt: Prompt, answer: Generation) -> float:
        text = self._tokenizer.decode(answer.tokens[answer.prompt_len :].tolist(), skip_special_tokens=True)
        return self._task.score(prompt, text)

    def _pack(self, kept: Sequence[tuple[_Sample, Generation]], rewards: Sequence[float]) -> Batch:
        return Batch.pack(
            [
                Trajectory(
                    group=sample.group,
                    member=sample.member,
                    tokens=answer.tokens,
                    prompt_len=answer.prompt_len,
                    logprobs=answer.logprobs,
                    routing=answer.routing,
                    reward=reward,
                    finish=answer.finish,
                    weight_version=answer.weight_version,
                    fingerprint=self._spec.model.fingerprint,
                )
                for (sample, answer), reward in zip(kept, rewards, strict=True)
            ],
            self._config.block_layers,
        )


def _settle_stale(answer: Generation, where: str, policy: OnStale) -> Generation | None:
    """Apply `routing.on_stale`; None for an answer that is to be dropped."""
    if answer.routing is None or not answer.stale:
        return answer
    try:
        routing = settle(answer.routing, answer.stale, answer.tokens, policy)
    except RoutingError as error:
        raise RoutingError(f"{where}: {error}") from error
    return None if routing is None else replace(answer, routing=routing)


def compare(cold: Sequence[Generation], warm: Sequence[Generation]) -> CanaryReport:
    """Compare captured greedy answers to the same prompts; expert lists are compared as sets."""
    equal_tokens = [np.array_equal(a.tokens, b.tokens) for a, b in zip(cold, warm, strict=True)]
    pairs = []
    for a, b in zip(cold, warm, strict=True):
        assert a.routing is not None
        assert b.routing is not None
        first, second = (np.sort(trace.experts[: a.prompt_len], axis=-1) for trace in (a.routing, b.routing))
        rows = min(len(first), len(second))
        pairs.append((first[:rows] == second[:rows]).all(axis=-1).reshape(-1))
    return CanaryReport(
        prompts=len(cold),
        equal_tokens=float(np.mean(equal_tokens)),
        equal_rows=float(np.mean(np.concatenate(pairs))) if pairs else 1.0,
        cached_tokens=sum(answer.cached_tokens for answer in warm),
    )


def _seed(*parts: int) -> int:
    """Return 32 well-mixed bits of the parts."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _load_tokenizer(model_dir: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)
