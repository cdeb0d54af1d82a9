"""The capture contract on real SGLang: whatever the scheduler does, rows are those of an independent forward.

Every row whose top-k margin exceeds 1e-5 must have the expert set of a float32 Hugging Face forward of prompt and
answer; rows nearer to a tie are counted. Each test runs with overlap scheduling on and off, on an engine whose
prefills come in chunks of 32 tokens and whose KV is small enough that requests are retracted under load.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3.rollout.engine import Generation, Request, Sampling
from r3.rollout.turns import merge_turns, next_start
from r3.routing import Span
from tests.engines import reference, scenarios
from tests.engines.conftest import CHUNK
from tests.tiny_model import EOS, VOCAB_SIZE

pytestmark = pytest.mark.engine

Worker = Callable[..., Any]
NEAR_TIE = 1e-5


@pytest.fixture(scope="module")
def engine(stamping: Worker, model_a: Path) -> Worker:
    """The shared engine, with the weights that these tests expect."""
    stamping("engine", "load_weights", model_a, 0)
    return stamping


def requests(count: int, seed: int, longest: int = 60) -> list[Request]:
    """Random prompts of mixed length."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, count)
    return [Request(generator.integers(2, VOCAB_SIZE, int(length)).astype(np.int32)) for length in lengths]


def generate(
    engine: Worker, prompts: Sequence[Request], tokens: int = 24, stops: tuple[int, ...] = (EOS, *range(2, 12))
) -> list[Generation]:
    """Stop tokens make answers of mixed length."""
    return engine("engine", "generate", prompts, Sampling(1.0, tokens, stops), capture=True)


def assert_contract(model: Path, answers: Sequence[Generation]) -> tuple[int, int]:
    """Check rows and log-probs of every answer; return how many rows were compared, and how many were near-ties."""
    compared = ties = 0
    for answer in answers:
        assert answer.defect is None
        assert answer.routing is not None
        assert answer.routing.rows == len(answer.tokens) - 1
        answer.routing.verify(answer.tokens)
        found = reference.forward(model, answer.tokens)
        clear = found.margins[:-1] > NEAR_TIE
        same = (np.sort(answer.routing.experts, axis=-1) == found.experts[:-1]).all(axis=-1)
        assert same[clear].all(), f"[row, layer] {np.argwhere(clear & ~same)[:3].tolist()} of {answer.routing.spans}"
        expected = reference.logprobs(found, answer.tokens, answer.prompt_len, 1.0)
        np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4, rtol=0)
        compared, ties = compared + int(clear.sum()), ties + int((~clear).sum())
    assert compared > 100 * ties
    return compared, ties


def test_mixed_lengths_at_batch_64_cold_and_from_the_cache(engine: Worker, model_a: Path) -> None:
    engine("engine", "load_weights", model_a, 1)
    prompts = requests(64, seed=1)
    cold, warm = (generate(engine, prompts, tokens=8) for _ in range(2))

    assert len({len(answer.logprobs) for answer in cold}) > 4
    assert max(answer.cached_tokens for answer in cold) <= 2, "random prompts share a token or two at most"
    assert sum(answer.cached_tokens for answer in warm) > 500
    assert max(len(request.tokens) for request in prompts) > CHUNK, "no prompt came in chunks"
    assert assert_contract(model_a, [*cold, *warm])[0] > 10_000
    assert engine("play", scenarios.describe).endswith("; ids of all layers are copied at once")


def test_rows_are_looked_at_while_others_are_generated(engine: Worker, model_a: Path) -> None:
    engine("engine", "load_weights", model_a, 1)
    sampling = Sampling(1.0, 48, (EOS, *range(2, 40)))
    for seed in (11, 12):
        answers, early, shared = engine("play", scenarios.looked_ahead, requests(32, seed=seed, longest=20), sampling)
        assert len({len(answer.logprobs) for answer in answers}) > 4
        assert 0 < early <= shared == len(answers)
        assert_contract(model_a, answers)


def test_one_prompt_longer_than_many_chunks(engine: Worker, model_a: Path) -> None:
    engine("engine", "load_weights", model_a, 2)
    long = np.random.default_rng(3).integers(2, VOCAB_SIZE, 10 * CHUNK + 5).astype(np.int32)
    answers = generate(engine, [*requests(2, seed=2, longest=1), Request(long)])
    assert_contract(model_a, answers)
    assert [answer.stale for answer in answers] == [()] * 3


def test_many_samples_of_a_prompt_as_requests_of_their_own(engine: Worker, model_a: Path) -> None:
    engine("engine", "load_weights", model_a, 3)
    answers = generate(engine, [request for request in requests(8, seed=4) for _ in range(8)], tokens=8)

    assert len({tuple(answer.tokens.tolist()) for answer in answers}) > 32
    assert [answer.stale for answer in answers] == [()] * 64
    assert_contract(model_a, answers)


def test_retraction_under_kv_pressure(engine: Worker, model_a: Path) -> None:
    engine("engine", "load_weights", model_a, 4)
    # SGLang believes that answers end early, as it does not of requests that ignore their end.
    answers = generate(engine, requests(64, seed=5, longest=20), tokens=60, stops=(EOS,))

    assert_contract(model_a, answers)
    stale = [answer for answer in answers if answer.stale]
    assert stale, "nothing was retracted, or the stamps missed it"
    for answer in stale:
        assert {(rows.wrote, rows.needed, rows.reason) for rows in answer.stale} == {(4, 4, "rewritten")}
        assert min(rows.begin for rows in answer.stale) <= answer.prompt_len
    assert {answer.routing.spans for answer in answers} == {(Span(0, len(answer.tokens) - 1, 4),) for answer in answers}


def test_abort_while_running(engine: Worker, model_a: Path) -> None:
    prompt = requests(1, seed=6)[0].tokens
    answer = engine("play", scenarios.aborted, prompt, model_a, 5)

    assert answer.finish == "abort"
    assert 3 <= len(answer.logprobs) < scenarios.NEW_TOKENS
    assert answer.stale == ()
    assert_contract(model_a, [answer])


def test_weights_that_change_between_two_turns(engine: Worker, model_a: Path, model_b: Path) -> None:
    engine("engine", "load_weights", model_a, 6)
    first = generate(engine, requests(8, seed=7), tokens=8)
    engine("engine", "load_weights", model_b, 7)
    second = generate(engine, [Request(answer.tokens) for answer in first], tokens=8)

    assert_contract(model_a, first)
    assert_contract(model_b, second)
    assert {answer.stale for answer in [*first, *second]} == {()}
    assert {span.weight_version for answer in second for span in answer.routing.spans} == {7}


def test_a_second_turn_asks_for_its_own_rows_alone(engine: Worker, model_a: Path) -> None:
    engine("engine", "load_weights", model_a, 8)
    first = generate(engine, requests(16, seed=8), tokens=8)
    prompts = [
        Request(np.append(a.tokens, [9, 8]).astype(np.int32), routing_start=next_start(a.routing)) for a in first
    ]
    # SGLang takes one start for a batch: the rows of longer first turns are cut after they came.
    assert len({request.routing_start for request in prompts}) > 4
    second = generate(engine, prompts, tokens=8)

    for request, after in zip(prompts, second, strict=True):
        assert after.routing.rows == len(after.tokens) - 1 - request.routing_start
        assert after.routing.provenance == "exact"
        assert after.routing.spans == (Span(request.routing_start, len(after.tokens) - 1, 8),)
    whole = [
        replace(after, routing=merge_turns(before.routing, after.routing, after.tokens))
        for before, after in zip(first, second, strict=True)
    ]
    assert_contract(model_a, whole)
    assert {answer.stale for answer in second} == {()}
