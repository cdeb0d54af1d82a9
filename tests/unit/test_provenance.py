"""Stamps of forward passes: their wire form, the spans and stale rows that follow, and the policies."""

from __future__ import annotations

import binascii
import json
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r3.errors import RoutingError
from r3.rollout import provenance
from r3.rollout.provenance import (
    KEY,
    StaleRows,
    Stamps,
    Weights,
    count,
    describe,
    pack,
    settle,
    stamped,
    unpack,
    with_provenance,
    without,
)
from r3.routing import RoutingTrace, Span

PROMPT, TOTAL = 5, 12
TOKENS = np.arange(TOTAL, dtype=np.int32)
V1 = Weights(1, "1", 0)


def trace(rows: int = TOTAL - 1) -> RoutingTrace:
    wide = np.stack([np.arange(rows) % 8, np.arange(rows) % 8 + 8], axis=-1)[:, None].repeat(3, axis=1)
    return RoutingTrace.record(
        wide, TOKENS[: rows + 1], layers=(0, 1, 2), num_experts=16, weight_version=1, engine="sglang 0.5.23"
    )


def passes(*parts: int) -> np.ndarray:
    return np.array(parts, dtype=np.int32)


def clean() -> tuple[np.ndarray, np.ndarray]:
    """A prompt in pass 7, then a pass per token."""
    tokens = np.arange(7, 7 + TOTAL - PROMPT, dtype=np.int32)
    return np.concatenate([np.full(PROMPT - 1, 7, np.int32), tokens]), tokens


def meta(rows: np.ndarray, tokens: np.ndarray, *weights: Weights) -> dict[str, Any]:
    return {KEY: [None] * (len(tokens) - 1) + [pack(rows, tokens, weights)]}


def judged(rows: np.ndarray, tokens: np.ndarray, *weights: Weights) -> tuple[RoutingTrace, tuple[StaleRows, ...]]:
    return with_provenance(
        trace(), meta(rows, tokens, *(weights or (V1,))), num_tokens=TOTAL, prompt_len=TOTAL - len(tokens)
    )


def test_a_clean_answer_is_exact_with_one_span() -> None:
    found, stale = judged(*clean())
    assert (found.provenance, found.spans, stale) == ("exact", (Span(0, TOTAL - 1, 1),), ())
    found.verify(TOKENS)


@given(
    data=st.data(),
    prompt_len=st.integers(1, 5),
    begin=st.integers(0, 7),
    sampled=st.integers(1, 5),
    first=st.integers(1, 3),
)
@settings(max_examples=300, deadline=None)
def test_a_plain_answer_is_one_that_has_no_stale_row(
    data: st.DataObject, prompt_len: int, begin: int, sampled: int, first: int
) -> None:
    """Few operations tell what the rules for every single row tell, of answers that are right or nearly so."""
    rows = prompt_len + sampled - 1 - begin
    if rows < 1:
        return
    tokens = np.arange(4, 4 + sampled, dtype=np.int32)
    where = begin + np.arange(rows)
    wrote = tokens[np.maximum(where + 1 - prompt_len, 0)].copy()
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, rows - 1), st.integers(0, 9)), max_size=2)):
        wrote[place] = value
    stamps = Stamps(wrote, tokens, (Weights(first, "1", 0),))
    record = trace(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "_is_plain", lambda *_: False)
        try:
            expected = stamped(record, stamps, prompt_len, begin)
        except RoutingError:
            expected = None
    plain = provenance._is_plain(stamps, prompt_len, begin)
    if expected is None:
        assert not plain
        return
    found = stamped(record, stamps, prompt_len, begin)
    assert (found[0].spans, found[0].provenance, found[1]) == (expected[0].spans, "exact", expected[1])
    assert plain == (not expected[1])


def test_an_answer_without_stamps_stays_unknown() -> None:
    for absent in ({}, {KEY: None}, {KEY: []}, {KEY: [None, None]}):
        found, stale = with_provenance(trace(), absent, num_tokens=TOTAL, prompt_len=PROMPT)
        assert (found.provenance, stale) == ("unknown", ())


def test_chunks_and_shared_prefixes_of_the_same_weights_are_not_stale() -> None:
    rows, tokens = clean()
    rows[:3], rows[3] = 2, 6
    assert judged(rows, tokens)[1] == ()
    rows[PROMPT - 1] = 5  # the cache kept a sibling's slot of the last prompt token
    assert judged(rows, tokens)[1] == ()


def test_a_prefix_of_older_weights_is_stale() -> None:
    rows, tokens = clean()
    rows[:3] = 2
    found, stale = judged(rows, tokens, V1, Weights(4, "2", 1))
    assert found.spans == (Span(0, 3, 1), Span(3, TOTAL - 1, 2))
    assert stale == (StaleRows(0, 3, wrote=1, needed=2, reason="version"),)


def test_rows_written_again_behind_their_log_probs_are_stale() -> None:
    rows, tokens = clean()
    rows[PROMPT:8] = 20  # rewritten after token 8 was sampled, then generation went on in pass 20
    rows[8:], tokens[4:] = [20, 21, 22], [20, 21, 22]
    found, stale = judged(rows, tokens)
    assert stale == (StaleRows(PROMPT, 8, wrote=1, needed=1, reason="rewritten"),)
    assert found.spans == (Span(0, TOTAL - 1, 1),)


def test_rows_of_a_sibling_that_decoded_the_same_tokens_earlier_are_not_ones_own() -> None:
    rows, tokens = clean()
    rows[6] -= 1
    assert judged(rows, tokens)[1] == (StaleRows(6, 7, 1, 1, "rewritten"),)


def test_prompt_rows_rewritten_behind_the_first_token_are_stale_even_if_later_tokens_saw_them() -> None:
    rows, tokens = clean()
    rows[:PROMPT] = 9
    assert judged(rows, tokens)[1] == (StaleRows(0, PROMPT, 1, 1, "rewritten"),)


def test_an_update_in_place_leaves_two_spans_and_nothing_stale() -> None:
    found, stale = judged(*clean(), V1, Weights(10, "2", 4))
    assert found.spans == (Span(0, 7, 1), Span(7, TOTAL - 1, 2))
    assert stale == ()


def test_a_row_that_no_pass_wrote_is_stale() -> None:
    rows, tokens = clean()
    rows[1:3] = 0
    found, stale = judged(rows, tokens)
    assert found.spans == (Span(0, 1, 1), Span(1, 3, provenance.UNWRITTEN), Span(3, TOTAL - 1, 1))
    assert stale == (StaleRows(1, 3, provenance.UNWRITTEN, 1, "unwritten"),)


def test_rows_behind_a_start_are_judged_by_their_position() -> None:
    rows, tokens = clean()
    part = trace().clip(3, TOTAL, TOKENS)
    found, stale = with_provenance(part, meta(rows[3:], tokens, V1), num_tokens=TOTAL, prompt_len=PROMPT, begin=3)
    assert (found.spans, stale) == ((Span(3, TOTAL - 1, 1),), ())


def test_nothing_depends_on_the_rows_of_an_answer_without_tokens() -> None:
    stamps = Stamps(passes(2, 2, 9), passes(), (V1,))
    assert stamped(trace(3), stamps, 4)[1] == ()


@pytest.mark.parametrize("label", ["default", "v2", ""])
def test_names_that_are_no_versions_are_refused(label: str) -> None:
    with pytest.raises(RoutingError, match=r"a record needs integers: start it with weight_version=0"):
        judged(*clean(), Weights(1, label, 0))


def test_two_weights_of_one_name_are_refused() -> None:
    with pytest.raises(RoutingError, match=r"weights changed \(update 3\) and are still called 1"):
        judged(*clean(), V1, Weights(9, "1", 3))


def damaged(**changes: Any) -> dict[str, Any]:
    rows, tokens = clean()
    return {KEY: [pack(rows, tokens, (V1,)) | changes]}


def text(values: list[int]) -> str:
    return binascii.b2a_base64(zlib.compress(np.array(values, "<i4").tobytes()), newline=False).decode()


MALFORMED: dict[str, tuple[Any, str]] = {
    "another format": (damaged(format=2), "stamps of format 1 are required"),
    "no object": ({KEY: ["stamps"]}, "stamps of format 1 are required"),
    "rows absent": (damaged(rows=None), "stamps of the rows cannot be decoded"),
    "not base64": (damaged(rows="$$"), "stamps of the rows cannot be decoded"),
    "not compressed": (damaged(rows="AAAA"), "stamps of the rows cannot be decoded"),
    "truncated": (damaged(rows=text([1] * 4000)[:20]), "stamps (came back|of the rows cannot be decoded)"),
    "of another answer": (damaged(rows=text([7] * 3)), "3 or more stamps came back for 11 rows"),
    "a bomb": (damaged(tokens=text([0] * 10_000_000)), "7.25 or more stamps came back for 7 sampled tokens"),
    "negative": (damaged(tokens=text([-3] + [0] * 6)), r"no number of a forward pass \(-3\)"),
    "no weights": (damaged(weights=[]), "ascending numbers are required"),
    "weights in disorder": (damaged(weights=[[5, "1", 0], [2, "2", 1]]), "ascending numbers are required"),
    "weights of a wrong form": (damaged(weights=[[1]]), "name their weights as"),
    "weights that begin too late": (damaged(weights=[[8, "1", 0]]), "before pass"),
}


@pytest.mark.parametrize(("value", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_stamps_are_refused(value: dict[str, Any], message: str) -> None:
    with pytest.raises(RoutingError, match=message):
        with_provenance(trace(), value, num_tokens=TOTAL, prompt_len=PROMPT)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=60),
    st.lists(st.integers(1, 2**31 - 1), max_size=60),
)
def test_stamps_survive_json(rows: list[int], tokens: list[int]) -> None:
    sent = {KEY: [pack(passes(*rows), passes(*tokens), (V1, Weights(2**20, "2", 1)))]}
    if not any([*rows, *tokens]):
        return
    found = unpack(json.loads(json.dumps(sent)), len(rows), len(tokens))
    assert found is not None
    assert found.rows.tolist() == rows
    assert found.tokens.tolist() == tokens
    for one in [one for one in [*rows, *tokens] if one]:
        assert [w for w in found.weights if w.first <= one][-1].label == ("2" if one >= 2**20 else "1")


def test_stamps_beside_rows_in_memory_say_the_same() -> None:
    rows, tokens = np.array([3, 3, 0, 9], np.int32), np.array([5, 9], np.int32)
    weights = [Weights(1, "0", 0), Weights(4, "1", 1), Weights(8, "2", 2)]
    data = provenance.to_bytes(rows, tokens, weights)
    found = provenance.from_bytes(data, 4, 2)
    assert found is not None
    assert (found.rows.tolist(), found.tokens.tolist(), found.weights) == ([3, 3, 0, 9], [5, 9], tuple(weights))
    assert provenance.from_bytes(b"", 4, 2) is None
    for rows_, tokens_, cut in ((5, 2, None), (4, 3, None), (4, 2, 10), (4, 2, -1)):
        with pytest.raises(RoutingError, match="stamps"):
            provenance.from_bytes(data[:cut], rows_, tokens_)


def test_a_long_generation_takes_next_to_nothing_on_the_wire() -> None:
    tokens = np.arange(2000, 2000 + 32_000, dtype=np.int32)
    rows = np.concatenate([np.full(767, 1999, np.int32), tokens])
    assert len(json.dumps(pack(rows, tokens, (V1,)))) < 0.1 * len(rows)


STALE = (StaleRows(2, 4, 0, 1, "version"), StaleRows(8, 9, 1, 1, "rewritten"))


def test_policies() -> None:
    record = trace()
    with pytest.raises(RoutingError, match=r"3 of 11 rows are stale: rows 2 to 3 written under weights 0.*on_stale"):
        settle(record, STALE, TOKENS, "fail")
    assert settle(record, STALE, TOKENS, "drop_sample") is None
    assert settle(record, (), TOKENS, "fail") is record
    kept = settle(record, STALE, TOKENS, "native_rows")
    assert kept is not None
    assert kept.spans == (Span(0, 2, 1), Span(4, 8, 1), Span(9, 11, 1))
    np.testing.assert_array_equal(kept.experts, record.experts[[0, 1, 4, 5, 6, 7, 9, 10]])
    kept.validate(TOTAL)
    kept.verify(TOKENS)
    assert count(STALE) == 3
    assert "rows 8 to 8 written again" in describe(STALE)


@settings(deadline=None)
@given(
    st.lists(st.booleans(), min_size=TOTAL - 1, max_size=TOTAL - 1),
    st.lists(st.integers(0, 2), min_size=11, max_size=11),
)
def test_cutting_rows_keeps_the_others_with_their_positions_and_versions(cut: list[bool], versions: list[int]) -> None:
    record, _ = stamped(
        trace(),
        Stamps(
            passes(*(1 + 10 * v for v in versions)),
            passes(*range(1, 8)),
            tuple(Weights(1 + 10 * v, str(v), v) for v in range(3)),
        ),
        PROMPT,
    )
    kept = without(record, [StaleRows(i, i + 1, 0, 1, "version") for i in range(TOTAL - 1) if cut[i]], TOKENS)
    left = [i for i in range(TOTAL - 1) if not cut[i]]

    assert kept.positions().tolist() == left
    assert [span.weight_version for span in kept.spans for _ in range(span.begin, span.end)] == [
        versions[i] for i in left
    ]
    np.testing.assert_array_equal(kept.experts, record.experts[left])
    kept.validate(TOTAL)
    kept.verify(TOKENS)
