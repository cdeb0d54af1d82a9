"""Adversarial cases of staleness and versions: well-formed rows that are not those behind the log-probs.

What an engine would have sent is built here: rows `[S-1, layers, k]` and, where the plugin runs, stamps of the passes
that wrote them. Each case ends as refused (with which error), as stale (and what the policies make of it) or accepted
as what it is. Layouts whose rows no stamp could prove are refused by their arguments.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3.config import Config
from r3.errors import ConfigError, EngineError, RoutingError
from r3.rollout.engine import EngineSpec, Generation, Request, Sampling, check_generation
from r3.rollout.engines import sglang
from r3.rollout.engines.sglang_args import check_engine_args
from r3.rollout.provenance import KEY, UNWRITTEN, StaleRows, Weights, pack, settle, with_provenance
from r3.rollout.sglang_plugin import hooks
from r3.rollout.wire import decode_sglang
from r3.routing import RoutingTrace, Span
from r3.types import ModelSpec
from r3.weights import WeightBuckets
from tests.engines.test_sglang_adapter import StubEngine
from tests.stand_in_scheduler import Scheduler, stamps
from tests.stand_in_scheduler import answer as request_of
from tests.tiny_model import write_files

MODEL = ModelSpec("qwen3_moe", 4, (0, 1, 2, 3), 16, 4, 64, 100)
PROMPT, TOTAL = 6, 14
TOKENS = np.arange(20, 20 + TOTAL, dtype=np.int32)
OLD, NEW = Weights(1, "1", 0), Weights(50, "2", 1)


def wide(rows: int = TOTAL - 1, seed: int = 0) -> np.ndarray:
    """Distinct experts for every row and layer, as SGLang holds them."""
    generator = np.random.default_rng(seed)
    return generator.random((rows, MODEL.num_layers, MODEL.num_experts)).argsort(2)[:, :, : MODEL.top_k].astype("<i4")


def decode(rows: np.ndarray, tokens: np.ndarray = TOKENS) -> RoutingTrace:
    payload = base64.b64encode(np.ascontiguousarray(rows, dtype="<i4").tobytes())
    return decode_sglang(payload, tokens, MODEL, request=7, weight_version=2, engine="sglang 0.5.23").routing


def stamped(
    rows: Sequence[int], tokens: Sequence[int], weights: Sequence[Weights] = (OLD, NEW), total: int = TOTAL
) -> tuple[RoutingTrace, tuple[StaleRows, ...]]:
    """A decoded answer whose rows and sampled tokens are of the given passes."""
    stamps = pack(np.array(rows, dtype=np.int32), np.array(tokens, dtype=np.int32), weights)
    meta = {KEY: [None] * (len(tokens) - 1) + [stamps]}
    own = np.arange(20, 20 + total, dtype=np.int32)
    return with_provenance(decode(wide(total - 1), own), meta, num_tokens=total, prompt_len=total - len(tokens))


def answer(trace: RoutingTrace | None, stale: tuple[StaleRows, ...] = (), **changes: Any) -> Generation:
    found = Generation(
        tokens=TOKENS, prompt_len=PROMPT, logprobs=np.zeros(TOTAL - PROMPT, np.float32), routing=trace, finish="length",
        weight_version=2, stale=stale,
    )  # fmt: skip
    return replace(found, **changes)


def checked(found: Generation) -> RoutingError | None:
    spec = EngineSpec(MODEL, "sglang 0.5.23", True, "bfloat16")
    return check_generation(Request(TOKENS[:PROMPT]), found, spec, capture=True)


RESPONSE = list(range(60, 60 + TOTAL - PROMPT))  # passes of a generation under the new weights
CLEAN = [60] * (PROMPT - 1) + RESPONSE

# Passes that wrote the rows, passes of the sampled tokens, the stale rows that follow, spans before any policy.
STALE = [
    pytest.param(
        # Slots that a restore filled have no writer; stale rows of whoever had them before would look well-formed.
        [0, 0, 0, *CLEAN[3:]], RESPONSE,
        (StaleRows(0, 3, UNWRITTEN, 2, "unwritten"),), (Span(0, 3, UNWRITTEN), Span(3, TOTAL - 1, 2)),
        id="case-27-restored-kv-that-no-pass-wrote",
    ),
    pytest.param(
        [0] * (PROMPT - 1) + RESPONSE, RESPONSE,
        (StaleRows(0, PROMPT - 1, UNWRITTEN, 2, "unwritten"),),
        (Span(0, PROMPT - 1, UNWRITTEN), Span(PROMPT - 1, TOTAL - 1, 2)),
        id="case-28-prompt-rows-of-a-decode-node",
    ),
    pytest.param(
        # The connector brought KV; the slots still carry the stamps of a request under the old weights.
        [5, 6, 7, *CLEAN[3:]], RESPONSE,
        (StaleRows(0, 3, 1, 2, "version"),), (Span(0, 3, 1), Span(3, TOTAL - 1, 2)),
        id="case-29-slots-of-a-connector-with-older-rows",
    ),
    pytest.param(
        # Four tokens were sampled under the old weights; a retraction, an update, then a re-prefill in pass 60.
        [60] * 10 + [61, 62, 63], [40, 41, 42, 43, 60, 61, 62, 63],
        (StaleRows(0, 9, 2, 1, "version"),), (Span(0, TOTAL - 1, 2),),
        id="case-41-retraction-then-update",
    ),
    pytest.param(
        # As above without an update: the same weights, but not the passes behind the log-probs.
        [30] * PROMPT + [60] * 4 + [61, 62, 63], [50, 51, 52, 53, 60, 61, 62, 63],
        (StaleRows(0, PROMPT, 1, 2, "version"), StaleRows(PROMPT, 9, 2, 2, "rewritten")),
        (Span(0, PROMPT, 1), Span(PROMPT, TOTAL - 1, 2)),
        id="case-43-rows-replaced-behind-their-log-probs",
    ),
    pytest.param(
        [30] * PROMPT + RESPONSE[1:], RESPONSE,
        (StaleRows(0, PROMPT, 1, 2, "version"),), (Span(0, PROMPT, 1), Span(PROMPT, TOTAL - 1, 2)),
        id="case-44-prefix-that-outlived-an-update",
    ),
    pytest.param(
        # A sibling computed the shared prompt before the update, this sample its last token behind it.
        [49] * (PROMPT - 1) + RESPONSE, RESPONSE,
        (StaleRows(0, PROMPT - 1, 1, 2, "version"),), (Span(0, PROMPT - 1, 1), Span(PROMPT - 1, TOTAL - 1, 2)),
        id="case-45-prompt-rows-of-a-sibling-across-an-update",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "tokens", "stale", "spans"), STALE)
def test_rows_that_are_not_those_behind_the_log_probs_are_named_and_settled(
    rows: list[int], tokens: list[int], stale: tuple[StaleRows, ...], spans: tuple[Span, ...]
) -> None:
    found, reported = stamped(rows, tokens)

    assert reported == stale
    assert found.provenance == "exact"
    assert found.spans == spans
    assert checked(answer(found, reported)) is None, "the record is well-formed; only its stamps tell"
    with pytest.raises(RoutingError, match="rows are stale"):
        settle(found, reported, TOKENS, "fail")
    assert settle(found, reported, TOKENS, "drop_sample") is None
    kept = settle(found, reported, TOKENS, "native_rows")
    assert kept is not None
    cut = {position for rows in stale for position in range(rows.begin, rows.end)}
    assert set(kept.positions().tolist()) == set(range(TOTAL - 1)) - cut
    kept.validate(TOTAL)
    kept.verify(TOKENS)


@pytest.mark.parametrize(
    "rows",
    [pytest.param(rows, id=parameter.id) for parameter in STALE for rows in [parameter.values[0]]],
)
def test_without_stamps_the_same_answers_are_unknown(rows: list[int]) -> None:
    found, stale = with_provenance(decode(wide()), {}, num_tokens=TOTAL, prompt_len=PROMPT)
    assert (found.provenance, stale) == ("unknown", ())


SOUND = [
    pytest.param(CLEAN, RESPONSE, (Span(0, TOTAL - 1, 2),), id="case-39-computed-in-one-go"),
    pytest.param([55] * 4 + CLEAN[4:], RESPONSE, (Span(0, TOTAL - 1, 2),), id="case-39-prefix-hit"),
    pytest.param([55] * PROMPT + RESPONSE[1:], RESPONSE, (Span(0, TOTAL - 1, 2),), id="case-39-whole-prompt-cached"),
    pytest.param([57, 57, 58, 58, 59, 60, *RESPONSE[1:]], RESPONSE, (Span(0, TOTAL - 1, 2),), id="case-33-chunks"),
    pytest.param(
        [40] * PROMPT + [41, 42, 43, 50, 51, 52, 53], [40, 41, 42, 43, 50, 51, 52, 53],
        (Span(0, 9, 1), Span(9, TOTAL - 1, 2)), id="case-43-two-segments-each-with-its-own-rows",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "tokens", "spans"), SOUND)
def test_what_a_scheduler_may_do_to_a_sample_is_no_alarm(
    rows: list[int], tokens: list[int], spans: tuple[Span, ...]
) -> None:
    found, stale = stamped(rows, tokens)
    assert (found.spans, stale) == (spans, ())
    assert settle(found, stale, TOKENS, "fail") is found


REFUSED_LAYOUTS = [
    pytest.param("enable_hierarchical_cache", True, "26975", id="case-27-restored-kv"),
    pytest.param("disaggregation_mode", "decode", "22916", id="case-28-prefill-and-decode-apart"),
    pytest.param("enable_lmcache", True, "39568", id="case-29-external-kv"),
    pytest.param("speculative_algorithm", "EAGLE", "38717", id="case-30-draft-router"),
    pytest.param("dp_size", 2, "one data-parallel replica", id="case-35-slice-of-another-rank"),
    pytest.param("enable_two_batch_overlap", True, "one capture buffer", id="case-40-two-microbatches-in-flight"),
]


@pytest.mark.parametrize(("option", "value", "reason"), REFUSED_LAYOUTS)
def test_layouts_that_make_such_rows_are_refused_before_the_engine_starts(
    option: str, value: object, reason: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{option}={value!r} is refused: .*{reason}"):
        check_engine_args({option: value}, capture=True)


def zeros(rows: slice) -> np.ndarray:
    found = wide()
    found[rows] = 0
    return found


REFUSED_ROWS = [
    pytest.param(zeros(np.s_[:PROMPT]), r"never written by the engine", id="case-28-prompt-rows-not-sent"),
    pytest.param(zeros(np.s_[9:]), r"never written by the engine", id="case-35-slice-beyond-the-buffer"),
    pytest.param(wide(9), r"9 rows .*14 tokens need 13 rows", id="case-38-preemption-lost-rows"),
    pytest.param(wide(TOTAL - 1 - 4), r"9 rows .*need 13 rows", id="case-39-hook-saw-only-uncached-rows"),
    pytest.param(np.concatenate([wide(), wide(8)]), r"21 rows .*need 13 rows", id="case-42-full-array-sent-twice"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "message"), REFUSED_ROWS)
def test_rows_that_cannot_be_those_of_the_tokens_are_refused(rows: np.ndarray, message: str) -> None:
    with pytest.raises(RoutingError, match=message):
        decode(rows)


REPEATED = [
    pytest.param(np.repeat(wide(1), 199, axis=0), "rows 0 to 198", id="case-32-one-row-for-every-output-token"),
    pytest.param(
        np.concatenate([wide(100), np.repeat(wide(101)[-1:], 67, axis=0), wide(199)[167:]]), "rows 100 to 166",
        id="case-33-one-row-repeated-at-a-chunk-boundary",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "which"), REPEATED)
def test_a_block_of_one_row_is_refused(rows: np.ndarray, which: str) -> None:
    tokens = np.arange(200, dtype=np.int32) % 90
    with pytest.raises(RoutingError, match=f"{which} are identical in all {MODEL.num_layers} layers"):
        decode(rows, tokens)


@pytest.mark.parametrize("overlap", [pytest.param(True, id="case-31-buffer-used-again-before-its-copy")])
def test_a_pass_that_is_under_way_does_not_take_the_rows_of_the_one_before(
    overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pass 2 starts, and is numbered, before the rows of pass 1 are written; pass 4 before those of pass 3.
    monkeypatch.setattr(hooks, "_captures_routing", lambda capturer: True)
    engine, one = Scheduler(overlap), request_of(2, 5, 6, 7, 8)
    first, second = engine.launch(5, 6), engine.launch(7)
    engine.process(first, one)
    engine.process(second, one)
    third, overshoot = engine.launch(8), engine.launch(9)
    engine.process(third, one, finish=one)

    assert stamps(one)[:2] == ([1, 1, 2, 3], [1, 2, 3])
    engine.process(overshoot)
    assert engine.ledger.stamps_of(np.array([8, 9])).tolist() == [3, 4]


@pytest.mark.parametrize("refusals", [pytest.param(10**9, id="case-44-flush-refused")])
def test_an_engine_whose_flush_is_refused_does_not_answer(
    refusals: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang, "_cpu_engine", lambda: (StubEngine, "0.5.23"))
    config = Config.model_validate({"weights": {"flush_timeout_s": 0.05}})
    adapter = sglang.SglangEngine(config, write_files(tmp_path / "model"), 0)
    adapter._engine.refused_flushes = refusals
    with pytest.raises(EngineError, match="refused to flush its cache"):
        adapter.load_weights(WeightBuckets(1, ()), 1)
    with pytest.raises(EngineError, match="half-loaded weights"):
        adapter.generate([Request(TOKENS)], Sampling(1.0, 4), capture=True)
    adapter.close()


TURNS = [
    pytest.param(TOTAL - 1, None, id="case-05-start-at-the-last-token-of-the-turn-before"),
    pytest.param(TOTAL, "15 routing rows for 17 tokens; 16 are required", id="case-05-start-one-too-late"),
]


@pytest.mark.parametrize(("start", "message"), TURNS)
def test_a_second_turn_must_begin_with_the_row_of_the_last_token(start: int, message: str | None) -> None:
    tokens = np.arange(20, 20 + TOTAL + 3, dtype=np.int32)
    first = decode(wide())
    later = decode(wide(len(tokens) - 1), tokens).clip(start, len(tokens), tokens)
    joined = first.concatenate(later, tokens)
    found = answer(joined, tokens=tokens, logprobs=np.zeros(len(tokens) - PROMPT, np.float32))

    defect = checked(found)
    assert (None if defect is None else str(defect)) == message


@pytest.mark.parametrize("begin", [pytest.param(0, id="case-42-whole"), pytest.param(9, id="case-42-part")])
def test_segments_that_overlap_are_not_joined(begin: int) -> None:
    record = decode(wide())
    with pytest.raises(RoutingError, match="overlap those up to"):
        record.clip(0, 10, TOKENS).concatenate(record.clip(begin, TOTAL, TOKENS), TOKENS)


def test_segments_of_two_versions_keep_the_rows_of_the_first() -> None:
    """case-43: the first writer of a row wins; the record names both versions."""
    first, _ = stamped([40] * PROMPT + [41, 42], [40, 41, 42], (OLD,), total=PROMPT + 3)
    resumed, _ = stamped(CLEAN, RESPONSE, (NEW,))
    joined = first.concatenate(resumed.clip(first.rows, TOTAL, TOKENS), TOKENS)

    assert joined.spans == (Span(0, PROMPT + 2, 1), Span(PROMPT + 2, TOTAL - 1, 2))
    assert joined.provenance == "exact"
    np.testing.assert_array_equal(joined.experts[: first.rows], first.experts)
    assert checked(answer(joined)) is None
