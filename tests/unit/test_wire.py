"""SGLang's wire format: a well-formed payload is decoded exactly, a malformed one is refused by name."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from r3.errors import EngineError, RoutingError
from r3.rollout.engine import EngineSpec, Generation, Request, check_generation
from r3.rollout.wire import decode_sglang
from r3.routing import RoutingTrace
from r3.types import ModelSpec

MODEL = ModelSpec("qwen3_moe", 6, (1, 2, 4, 5), 16, 4, 64, 100)  # layers 0 and 3 are dense
TOKENS = np.arange(10, 22, dtype=np.int32)
ROWS = len(TOKENS) - 1


def wide(seed: int = 0, model: ModelSpec = MODEL) -> np.ndarray:
    """`[rows, num_layers, k]` int32 as SGLang sends it: distinct experts in MoE layers, zeros in dense ones."""
    generator = np.random.default_rng(seed)
    rows = generator.random((ROWS, model.num_layers, model.num_experts)).argsort(axis=2)[:, :, : model.top_k]
    rows[:, [i for i in range(model.num_layers) if i not in model.moe_layers]] = 0
    return rows.astype(np.int32)


def encode(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def decode(payload: str | bytes | None, tokens: np.ndarray = TOKENS, model: ModelSpec = MODEL) -> RoutingTrace:
    return decode_sglang(payload, tokens, model, request=7, weight_version=3, engine="sglang 0.5.23").routing


def test_rows_arrive_as_they_were_sent_without_the_dense_layers() -> None:
    sent = wide()
    trace = decode(encode(sent))

    np.testing.assert_array_equal(trace.experts, sent[:, [1, 2, 4, 5]])
    assert trace.experts.dtype == np.uint8
    assert trace.experts.flags.c_contiguous
    assert not trace.experts.flags.writeable
    assert trace.layers == (1, 2, 4, 5)
    assert [tuple(span) for span in trace.spans] == [(0, ROWS, 3)]
    assert trace.engine == "sglang 0.5.23"
    assert trace.provenance == "unknown"
    trace.verify(TOKENS)


@pytest.mark.parametrize(("experts", "dtype"), [(255, np.uint8), (256, np.uint8), (257, np.uint16), (384, np.uint16)])
def test_width_follows_the_expert_count_and_the_last_id_survives(experts: int, dtype: type) -> None:
    model = replace(MODEL, num_experts=experts)
    sent = wide()
    sent[:, 1, 0] = experts - 1
    trace = decode(encode(sent), model=model)

    assert trace.experts.dtype == dtype
    assert (trace.experts[:, 0, 0] == experts - 1).all()


def test_one_token_has_no_rows() -> None:
    assert decode("", TOKENS[:1]).rows == 0


def test_ids_in_the_records_own_width_are_told_apart_by_their_size() -> None:
    narrow = encode(wide().astype(np.uint8))
    np.testing.assert_array_equal(decode(narrow).experts, decode(encode(wide())).experts)
    with pytest.raises(RoutingError, match=r"264 bytes .* int32; 12 tokens need 11 rows"):
        decode_sglang(narrow, TOKENS, MODEL, request=7, weight_version=3, engine="sglang 0.5.23", dtype="int32")


def changed(change: Callable[[np.ndarray], None]) -> str:
    rows = wide()
    change(rows)
    return encode(rows)


def put(row: int, layer: int, slot: int, value: int) -> Callable[[np.ndarray], None]:
    def change(rows: np.ndarray) -> None:
        rows[row, layer, slot] = value

    return change


def repeat(rows: np.ndarray) -> None:
    rows[4, 2, 1] = rows[4, 2, 0]


def zero_layer(rows: np.ndarray) -> None:
    rows[:, 4] = 0


def zero_row(rows: np.ndarray) -> None:
    rows[6] = 0


MALFORMED = {
    "absent": (None, "request 7: no routing came back.*enable_return_routed_experts"),
    "not base64": ("routes!", "request 7: routing is not base64"),
    "truncated base64": (encode(wide())[:-3], "request 7: routing is not base64"),
    "not ascii": ("é" * 8, "request 7: routing is not base64"),
    "one row short": (encode(wide()[:-1]), "10 rows of 6 layers x top-4 int32; 12 tokens need 11 rows"),
    "one row more, for the last token": (encode(np.concatenate([wide(), wide()[:1]])), "12 rows .* need 11 rows"),
    "response rows only": (encode(wide()[6:]), "5 rows .* need 11 rows"),
    "empty": ("", "0 rows .* need 11 rows"),
    "MoE layers only": (encode(np.ascontiguousarray(wide()[:, [1, 2, 4, 5]])), "7.33333 rows"),
    "sixteen bits wide": (encode(wide().astype(np.int16)), "5.5 rows"),
    "padding of -1": (changed(put(3, 2, 1, -1)), r"expert id -1 at row 3, layer 2, slot 1"),
    "shared expert as id E": (changed(put(5, 4, 3, 16)), r"expert id 16 at row 5, layer 4, slot 3"),
    "255 as filler": (changed(put(0, 5, 0, 255)), "expert id 255 at row 0, layer 5, slot 0"),
    "id that would wrap to a valid one": (changed(put(2, 1, 0, 256 + 3)), "expert id 259 at row 2, layer 1, slot 0"),
    "repeated id": (changed(repeat), "row 4, layer 2 repeats an expert"),
    "layer never written": (changed(zero_layer), r"row 0, layer 4 .*never written.*11 of 44"),
    "row never written": (changed(zero_row), r"row 6, layer 1 .*never written.*4 of 44"),
    "value in a dense layer": (changed(put(8, 3, 2, 5)), "row 8, layer 3 holds expert 5, but layer 3 is dense"),
    "layers in another order": (encode(np.ascontiguousarray(wide()[:, ::-1])), "layer 0 is dense"),
}


@pytest.mark.parametrize(("payload", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_payloads_are_refused_by_name(payload: str | None, message: str) -> None:
    with pytest.raises(RoutingError) as caught:
        decode(payload)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "request 7" in str(caught.value)


SPEC = EngineSpec(MODEL, "sglang 0.5.23", True, "float32")
REQUEST = Request(TOKENS[:5])


def generation(**changes: object) -> Generation:
    routing = decode(encode(wide()))
    answer = Generation(TOKENS, 5, np.full(7, -0.5, np.float32), routing, "stop", 3)
    return replace(answer, **changes)


def test_a_sound_answer_has_no_defect() -> None:
    assert check_generation(REQUEST, generation(), SPEC, capture=True) is None
    assert check_generation(REQUEST, generation(routing=None), SPEC, capture=False) is None


def test_an_answer_aborted_before_its_first_token_needs_no_record() -> None:
    nothing = {"tokens": TOKENS[:5], "logprobs": np.empty(0, np.float32), "routing": None}
    assert check_generation(REQUEST, generation(finish="abort", **nothing), SPEC, capture=True) is None
    assert "no routing" in str(check_generation(REQUEST, generation(finish="stop", **nothing), SPEC, capture=True))


def test_an_answer_aborted_later_needs_its_record() -> None:
    defect = check_generation(REQUEST, generation(finish="abort", routing=None), SPEC, capture=True)
    assert "no routing came back" in str(defect)


def test_a_record_of_other_rows_or_another_model_is_a_defect() -> None:
    short = decode(encode(wide()[:-1]), TOKENS[:-1])
    assert "10 routing rows for 12 tokens" in str(
        check_generation(REQUEST, generation(routing=short), SPEC, capture=True)
    )
    other = replace(SPEC, model=replace(MODEL, num_experts=32))
    assert "routing has (layers, experts, top-k)" in str(check_generation(REQUEST, generation(), other, capture=True))


BROKEN = {
    "other prompt": ({"tokens": TOKENS + 1}, "other prompt tokens"),
    "log-prob missing": ({"logprobs": np.zeros(6, np.float32)}, "6 log-probs came back for 7"),
    "log-prob of a token of probability 0": (
        {"logprobs": np.array([0, 0, -np.inf, 0, 0, 0, 0], np.float32)},
        "sampled token 2 is not finite",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_tokens_or_log_probs_are_errors_of_the_engine(changes: dict[str, object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        check_generation(REQUEST, generation(**changes), SPEC, capture=True)
