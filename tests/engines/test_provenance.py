"""Stamped rows on real SGLang: what the plugin says of a request's rows against what was done to the request.

The expected rows follow from where SGLang says that it stood when a test interfered; that they are the right ones is
shown by the rows themselves, which are those of the one or the other checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3.errors import RoutingError
from r3.rollout.engine import EngineSpec, Generation, Request, Sampling
from r3.rollout.provenance import StaleRows, settle
from r3.routing import Span
from tests.engines import reference, scenarios
from tests.tiny_model import VOCAB_SIZE

pytestmark = pytest.mark.engine

Worker = Callable[..., Any]
PROMPT_LEN = 20


def prompt(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, VOCAB_SIZE, PROMPT_LEN).astype(np.int32)


def rows_of(model: Path, answer: Generation, begin: int, end: int) -> bool:
    """Are rows `[begin, end)` those of a checkpoint that computed the whole sequence?"""
    found = reference.forward(model, answer.tokens[:-1])
    same = (np.sort(answer.routing.experts, axis=-1) == found.experts).all(axis=-1) | (found.margins < 1e-5)
    return bool(same[begin:end].all())


def sampled_under(model: Path, answer: Generation) -> int:
    """Leading response tokens whose log-probs are a checkpoint's."""
    found = reference.logprobs(reference.forward(model, answer.tokens), answer.tokens, answer.prompt_len, 1.0)
    return int(np.argmax(np.append(np.abs(found - answer.logprobs) > 1e-4, True)))


def test_the_engine_says_that_it_stamps(stamping: Worker) -> None:
    spec: EngineSpec = stamping("call", "spec")
    assert (spec.provenance, spec.unstamped) == ("exact", "")
    assert (spec.shared_memory, spec.unshared) == (True, "")


def test_rows_are_the_same_through_shared_memory_and_with_the_answers(stamping: Worker, model_a: Path) -> None:
    stamping("engine", "load_weights", model_a, 2)
    requests = [Request(prompt(100 + i)[: 3 + i]) for i in range(12)]
    shared, narrow, stock = stamping("play", scenarios.three_ways, requests, Sampling(1.0, 8, greedy=True))

    assert [{answer.wire.dtype for answer in way} for way in (shared, narrow, stock)] == [
        {"uint8"},
        {"uint8"},
        {"int32"},
    ]
    for one, two, three in zip(shared, narrow, stock, strict=True):
        assert np.array_equal(one.tokens, three.tokens)
        assert np.array_equal(one.routing.experts, two.routing.experts)
        assert np.array_equal(one.routing.experts, three.routing.experts)
        assert one.routing.spans == two.routing.spans == three.routing.spans
        assert one.routing.crc32 == three.routing.crc32
        assert one.stale == three.stale == ()
    handed, rows = stamping("play", scenarios.handed_over, requests[0])
    assert handed == rows > 0, "rows were copied on their way to the object store"


def test_clean_answers_are_exact_and_nothing_is_stale(stamping: Worker, model_a: Path) -> None:
    stamping("engine", "load_weights", model_a, 3)
    generator = np.random.default_rng(0)
    requests = [
        Request(generator.integers(2, VOCAB_SIZE, int(length)).astype(np.int32))
        for length in generator.integers(1, 40, 16)
        for _ in range(3)
    ]
    for _ in range(2):  # from an empty cache and from a warm one
        answers = stamping("engine", "generate", requests, Sampling(1.0, 12), capture=True)
        for answer in answers:
            assert answer.defect is None
            assert answer.routing.provenance == "exact"
            assert answer.stale == ()
            rows = len(answer.tokens) - 1
            assert answer.routing.spans == ((Span(0, rows, 3),) if rows else ())
    assert sum(answer.cached_tokens for answer in answers) > 0


def test_retraction_then_update_makes_every_row_stale_whose_token_had_a_successor(
    stamping: Worker, model_a: Path, model_b: Path
) -> None:
    played = stamping("play", scenarios.paused_update, prompt(1), model_a, model_b, 10, "retract", True)
    answer, rewritten = played.answer, PROMPT_LEN + played.sampled_before - 1

    assert played.retractions == 1
    assert answer.stale == (StaleRows(0, rewritten, wrote=11, needed=10, reason="version"),)
    assert answer.routing.spans == (Span(0, len(answer.tokens) - 1, 11),)
    assert rows_of(model_b, answer, 0, len(answer.tokens) - 1), "the rows are not those of the new weights"

    kept = settle(answer.routing, answer.stale, answer.tokens, "native_rows")
    assert kept.spans == (Span(rewritten, len(answer.tokens) - 1, 11),)
    kept.validate(len(answer.tokens))
    kept.verify(answer.tokens)


def test_an_update_in_place_gives_two_spans_and_no_stale_row(stamping: Worker, model_a: Path, model_b: Path) -> None:
    played = stamping("play", scenarios.paused_update, prompt(2), model_a, model_b, 20, "in_place", False)
    answer, last = played.answer, len(played.answer.tokens) - 1
    # Under overlap scheduling a pass may be under way when SGLang counts; it ran under the old weights.
    sampled_before = sampled_under(model_a, answer)
    # The row of the last token before the pause is written by the first pass under the new weights.
    changed = PROMPT_LEN + sampled_before - 1

    assert played.retractions == 0
    assert played.sampled_before <= sampled_before <= played.sampled_before + 1 < scenarios.NEW_TOKENS
    assert answer.routing.spans == (Span(0, changed, 20), Span(changed, last, 21))
    assert answer.stale == ()
    assert rows_of(model_a, answer, 0, changed)
    assert not rows_of(model_a, answer, changed, last)


def test_a_warm_prefix_survives_an_update_without_flush_and_is_stale(
    stamping: Worker, model_a: Path, model_b: Path
) -> None:
    answer = stamping("play", scenarios.warm_prefix, prompt(3), model_a, model_b, 30, False)

    # SGLang computes the last prompt token again, and then keeps the slot that its cache already has for it.
    assert answer.cached_tokens == PROMPT_LEN - 1
    assert answer.stale == (StaleRows(0, PROMPT_LEN, wrote=30, needed=31, reason="version"),)
    assert answer.routing.spans == (Span(0, PROMPT_LEN, 30), Span(PROMPT_LEN, len(answer.tokens) - 1, 31))
    assert rows_of(model_a, answer, 0, PROMPT_LEN), "the cached rows are not those of the old weights"
    with pytest.raises(RoutingError, match=r"rows 0 to 19 written under weights 30, their log-probs under 31"):
        settle(answer.routing, answer.stale, answer.tokens, "fail")


def test_an_update_with_flush_leaves_nothing_stale(stamping: Worker, model_a: Path, model_b: Path) -> None:
    answer = stamping("play", scenarios.warm_prefix, prompt(4), model_a, model_b, 40, True)
    assert answer.cached_tokens == 0
    assert answer.stale == ()
    assert answer.routing.spans == (Span(0, len(answer.tokens) - 1, 41),)
    assert rows_of(model_b, answer, 0, len(answer.tokens) - 1)


def test_a_retraction_alone_rewrites_the_rows_behind_the_cached_prompt(stamping: Worker, model_a: Path) -> None:
    played = stamping("play", scenarios.retracted, prompt(5), model_a, 50, "never")
    answer, end = played.answer, PROMPT_LEN + played.sampled_before - 1

    assert played.retractions == 1
    assert len(answer.logprobs) == scenarios.NEW_TOKENS
    assert answer.stale == (StaleRows(PROMPT_LEN, end, wrote=50, needed=50, reason="rewritten"),)
    assert answer.routing.spans == (Span(0, len(answer.tokens) - 1, 50),)
    assert rows_of(model_a, answer, 0, len(answer.tokens) - 1), "one set of weights, so the rows agree all the same"


def test_an_abort_behind_a_retraction_reports_the_rewritten_rows(stamping: Worker, model_a: Path) -> None:
    played = stamping("play", scenarios.retracted, prompt(6), model_a, 60, "running")
    answer, end = played.answer, PROMPT_LEN + played.sampled_before - 1

    assert answer.finish == "abort"
    assert played.sampled_before < len(answer.logprobs) < scenarios.NEW_TOKENS
    assert answer.stale == (StaleRows(PROMPT_LEN, end, wrote=60, needed=60, reason="rewritten"),)
    assert answer.routing.rows == len(answer.tokens) - 1


def test_an_abort_in_the_queue_behind_a_retraction_has_no_row_and_says_so(stamping: Worker, model_a: Path) -> None:
    answer = stamping("play", scenarios.retracted, prompt(7), model_a, 70, "queued").answer

    assert answer.finish == "abort"
    assert len(answer.logprobs) >= 3
    assert answer.routing is None
    assert "aborted in the queue" in str(answer.defect)
    assert "every routing row" in str(answer.defect)


def test_a_partial_answer_that_is_resumed_as_a_prompt_is_of_one_version(
    stamping: Worker, model_a: Path, model_b: Path
) -> None:
    stamping("engine", "load_weights", model_a, 80)
    (partial,) = stamping("engine", "generate", [Request(prompt(8))], Sampling(1.0, 8, ignore_eos=True), capture=True)
    stamping("engine", "load_weights", model_b, 81)
    (resumed,) = stamping("engine", "generate", [Request(partial.tokens)], Sampling(1.0, 8), capture=True)

    assert (partial.stale, resumed.stale) == ((), ())
    assert partial.routing.spans == (Span(0, len(partial.tokens) - 1, 80),)
    assert resumed.routing.spans == (Span(0, len(resumed.tokens) - 1, 81),)
    joined = partial.routing.concatenate(
        resumed.routing.clip(len(partial.tokens) - 1, len(resumed.tokens), resumed.tokens), resumed.tokens
    )
    assert [tuple(span) for span in joined.spans] == [
        (0, len(partial.tokens) - 1, 80), (len(partial.tokens) - 1, len(resumed.tokens) - 1, 81),
    ]  # fmt: skip
    assert joined.provenance == "exact"


def test_an_update_that_keeps_its_name_is_refused(stamping: Worker, model_a: Path, model_b: Path) -> None:
    answer = stamping("play", scenarios.unnamed_update, prompt(9), model_a, model_b, 90)
    assert "weights changed" in str(answer.defect)
    assert "still called 90" in str(answer.defect)
    stamping("engine", "load_weights", model_a, 91)


def test_the_prompt_of_a_group_is_shared_across_its_samples(stamping: Worker, model_a: Path, model_b: Path) -> None:
    stamping("engine", "load_weights", model_a, 100)
    requests = [Request(prompt(10))] * 8
    stamping("engine", "generate", requests, Sampling(1.0, 4, ignore_eos=True), capture=True)
    stamping("engine", "load_weights", model_b, 101)
    answers = stamping("engine", "generate", requests, Sampling(1.0, 4, ignore_eos=True), capture=True)

    assert {answer.stale for answer in answers} == {()}
    assert {answer.routing.spans for answer in answers} == {(Span(0, PROMPT_LEN + 3, 101),)}
