"""Known defects of engines and transports in presence, shape and dtype; ids are the case numbers of the catalogue.

Each payload is built as the engine would have sent it; the outcome is one of: accepted as what it is, refused with an
error that says why.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from r3.errors import EngineError, RoutingError
from r3.rollout.engine import EngineSpec, Generation, Request, check_generation
from r3.rollout.turns import merge_turns, next_start
from r3.rollout.wire import Wire, decode_lightllm, decode_sglang, decode_vllm
from r3.routing import RoutingTrace
from r3.types import Finish, ModelSpec
from tests.engines.wire_server import made_up_experts
from tests.engines.wire_server_lightllm import encode as encode_lightllm
from tests.engines.wire_server_sglang import encode as encode_sglang
from tests.engines.wire_server_vllm import encode as encode_vllm

MODEL = ModelSpec("qwen3_moe", 6, (1, 2, 4, 5), 16, 4, 64, 100)  # layers 0 and 3 are dense
TOKENS = np.arange(10, 22, dtype=np.int32)
PROMPT_LEN = 8
WHO: dict[str, Any] = {"request": 7, "weight_version": 3, "engine": "test"}


def moe_rows(model: ModelSpec = MODEL, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """`[S-1, moe_layers, k]` int64."""
    return made_up_experts(tokens, model.moe_layers, model)


def all_rows(model: ModelSpec = MODEL, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """`[S-1, num_hidden_layers, k]` int64, zeros in dense layers."""
    rows = np.zeros((len(tokens) - 1, model.num_layers, model.top_k), np.int64)
    rows[:, list(model.moe_layers)] = moe_rows(model, tokens)
    return rows


def sglang(payload: Any, tokens: np.ndarray = TOKENS, model: ModelSpec = MODEL, **options: Any) -> RoutingTrace:
    return decode_sglang(payload, tokens, model, **WHO, **options).routing


def lightllm(payload: Any, model: ModelSpec = MODEL, tokens: np.ndarray = TOKENS) -> RoutingTrace:
    return decode_lightllm(payload, tokens, model, **WHO).routing


def vllm(payload: Any, model: ModelSpec = MODEL, **options: Any) -> RoutingTrace:
    return decode_vllm(payload, TOKENS, model, **WHO, **options).routing


def outcome(finish: Finish, response: int, payload: str | None) -> RoutingError | None:
    """What is said of an SGLang answer with `response` sampled tokens that came with `payload`."""
    tokens = TOKENS[: PROMPT_LEN + response]
    routing, defect = None, None
    if not (finish == "abort" and not response):
        try:
            routing = sglang(payload, tokens)
        except RoutingError as error:
            defect = error
    answer = Generation(tokens, PROMPT_LEN, np.full(response, -0.5, np.float32), routing, finish, 3, defect=defect)
    return check_generation(Request(TOKENS[:PROMPT_LEN]), answer, EngineSpec(MODEL, "test", True, "x"), capture=True)


def wrapped(experts: int) -> dict[str, Any]:
    """LightLLM's int8 of a model with more experts than int8 holds, as it would have come out of a plain cast."""
    model = replace(MODEL, num_experts=experts)
    layer_major = moe_rows(model).transpose(1, 0, 2).astype(np.int8)
    return {
        "shape": list(layer_major.shape),
        "dtype": "int8",
        "data": base64.b64encode(np.ascontiguousarray(layer_major).tobytes()).decode(),
    }


def relabelled(payload: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return payload | changes


LATER = len(TOKENS) - 1 - 7  # rows from position 7 on
SQUARE = TOKENS[:5]  # four rows, as many as there are MoE layers
WIDE = replace(MODEL, num_experts=300)

ACCEPTED: list[Any] = [
    pytest.param(lambda: sglang(encode_sglang(all_rows()[7:]), start=7), moe_rows()[7:], id="case-4-start-honoured"),
    pytest.param(lambda: sglang(encode_sglang(all_rows()), start=7), moe_rows()[7:], id="case-4-start-ignored"),
    pytest.param(lambda: vllm(encode_vllm(all_rows(), MODEL), start=7), moe_rows()[7:], id="case-4-vllm"),
    pytest.param(lambda: lightllm(encode_lightllm(moe_rows(), "first", MODEL)), moe_rows(), id="case-9-int8"),
    pytest.param(
        lambda: lightllm(encode_lightllm(moe_rows(WIDE), "first", WIDE), WIDE), moe_rows(WIDE), id="case-9-int16"
    ),
    pytest.param(lambda: lightllm(encode_lightllm(moe_rows(), "documented", MODEL)), moe_rows(), id="case-9-int32"),
    pytest.param(lambda: lightllm(encode_lightllm(moe_rows(), "newest", MODEL)), moe_rows(), id="case-10-token-major"),
    pytest.param(
        lambda: lightllm(encode_lightllm(moe_rows(WIDE), "newest", WIDE), WIDE), moe_rows(WIDE),
        id="case-10-token-major-int16",
    ),
    pytest.param(
        lambda: lightllm(encode_lightllm(moe_rows(tokens=SQUARE), "newest", MODEL), tokens=SQUARE),
        moe_rows(tokens=SQUARE), id="case-10-square-uint8-is-token-major",
    ),
    pytest.param(
        lambda: lightllm(encode_lightllm(moe_rows(tokens=SQUARE), "first", MODEL), tokens=SQUARE),
        moe_rows(tokens=SQUARE), id="case-10-square-int8-is-layer-major",
    ),
    pytest.param(lambda: sglang(encode_sglang(all_rows())), moe_rows(), id="case-11-all-layers"),
    pytest.param(lambda: sglang(encode_sglang(all_rows(), np.int32)), moe_rows(), id="case-51-int32-without-plugin"),
    pytest.param(lambda: sglang(encode_sglang(all_rows(), np.uint8)), moe_rows(), id="case-51-uint8-with-plugin"),
    pytest.param(
        lambda: sglang(encode_sglang(all_rows(WIDE), np.uint16), model=WIDE), moe_rows(WIDE),
        id="case-51-uint16-with-plugin",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("decode", "expected"), ACCEPTED)
def test_accepted_as_what_it_is(decode: Callable[[], RoutingTrace], expected: np.ndarray) -> None:
    trace = decode()
    np.testing.assert_array_equal(trace.experts, expected)
    assert trace.spans[0].begin == len(TOKENS) - 1 - len(expected) or len(expected) == len(SQUARE) - 1
    assert trace.spans[-1].end - trace.spans[0].begin == len(expected)


TEXT = encode_sglang(all_rows())
REFUSED: list[Any] = [
    pytest.param(lambda: sglang(None), "no routing came back.*enable_return_routed_experts", id="case-1-sglang"),
    pytest.param(lambda: lightllm(None), "no routing came back.*--enable_return_routed_experts", id="case-1-lightllm"),
    pytest.param(lambda: vllm(None), "no routing came back.*--enable-return-routed-experts", id="case-1-vllm"),
    pytest.param(
        lambda: sglang(encode_sglang(all_rows()[5:]), start=7), "need 4 rows .or 11 from a server", id="case-4-neither"
    ),
    pytest.param(
        lambda: lightllm(relabelled(encode_lightllm(moe_rows(), "first", MODEL), dtype="int32")),
        "176 bytes, its shape .* int32 needs others", id="case-9-documented-dtype-over-int8-bytes",
    ),
    pytest.param(
        lambda: lightllm(relabelled(encode_lightllm(moe_rows(), "first", MODEL), dtype="uint8")),
        r"shape \[4, 11, 4\] uint8; .* need \[11, 4, 4\] \(token-major\)", id="case-10-layer-major-uint8",
    ),
    pytest.param(
        lambda: lightllm(encode_lightllm(moe_rows(WIDE, SQUARE), "first", WIDE), WIDE, SQUARE),
        "token-major or layer-major", id="case-10-square-int16-is-ambiguous",
    ),
    pytest.param(
        lambda: lightllm(encode_lightllm(all_rows(), "newest", MODEL)), r"shape \[11, 6, 4\] uint8; .* 4 MoE layers",
        id="case-11-lightllm-with-all-layers",
    ),
    pytest.param(lambda: sglang(encode_sglang(moe_rows())), "7.33333 rows", id="case-11-sglang-with-moe-layers"),
    pytest.param(
        lambda: vllm(encode_vllm(moe_rows(), MODEL)), r"shape \(11, 4, 4\); .* need \(11, 6, 4\)",
        id="case-11-vllm-with-moe-layers",
    ),
    pytest.param(
        lambda: sglang(encode_sglang(np.concatenate([all_rows(), all_rows()[:3]]))), "14 rows .* need 11 rows",
        id="case-14-sglang",
    ),
    pytest.param(
        lambda: vllm(encode_vllm(np.concatenate([all_rows(), all_rows()[:3]]), MODEL)), r"shape \(14, 6, 4\)",
        id="case-14-vllm",
    ),
    pytest.param(
        lambda: decode_vllm(encode_vllm(all_rows(), MODEL), TOKENS[:-2], MODEL, **WHO), "10 tokens, 6 layers",
        id="case-15-tokens-trimmed-behind-their-rows",
    ),
    pytest.param(
        lambda: lightllm(wrapped(200), replace(MODEL, num_experts=200)), "int8, which cannot hold expert ids up to 199",
        id="case-22-int8",
    ),
    pytest.param(
        lambda: lightllm(relabelled(encode_lightllm(moe_rows() - 100, "first", MODEL))), "expert id -[0-9]+ at row",
        id="case-22-negative",
    ),
    pytest.param(lambda: sglang(TEXT[:-4]), "1053 bytes", id="case-46-truncated-at-a-quantum"),
    pytest.param(lambda: sglang(TEXT[:-3]), "not base64.*truncated", id="case-46-truncated-inside-one"),
    pytest.param(lambda: sglang(TEXT.rstrip("=") + "===="), "not base64", id="case-46-padded-again"),
    pytest.param(lambda: sglang(TEXT + "AAAA"), "rows of 6 layers", id="case-46-with-more-behind"),
    pytest.param(lambda: vllm(encode_vllm(all_rows(), MODEL)[:-8]), "bytes behind its header", id="case-46-vllm"),
    pytest.param(
        lambda: lightllm(relabelled(encode_lightllm(moe_rows(), "newest", MODEL), data="AAAA")), "3 bytes, its shape",
        id="case-46-lightllm",
    ),
    pytest.param(
        lambda: sglang(encode_sglang(all_rows(), np.uint8), dtype="int32"), "264 bytes", id="case-51-pinned-int32"
    ),
    pytest.param(
        lambda: sglang(encode_sglang(all_rows(), np.int16)), "5.5 rows", id="case-51-a-width-that-nobody-sends"
    ),
]  # fmt: skip


@pytest.mark.parametrize(("decode", "message"), REFUSED)
def test_refused_with_the_reason(decode: Callable[[], RoutingTrace], message: str) -> None:
    with pytest.raises(RoutingError, match=message) as caught:
        decode()
    assert "request 7" in str(caught.value)


def test_two_readings_of_one_size_are_not_guessed() -> None:
    # Rows 0 to 3 of uint8 are as many bytes as row 3 of int32 alone.
    tokens = TOKENS[:5]
    narrow = encode_sglang(all_rows(tokens=tokens), np.uint8)
    with pytest.raises(RoutingError, match="fits int32 from row 3 and uint8 from row 0; name its dtype"):
        sglang(narrow, tokens, start=3)
    found = decode_sglang(narrow, tokens, MODEL, **WHO, start=3, dtype="uint8")
    assert (found.routing.rows, found.wire) == (1, Wire("uint8", 0))


ANSWERS: list[Any] = [
    pytest.param("abort", 0, None, None, id="case-2-nothing-was-sampled"),
    pytest.param("abort", 3, None, "no routing came back", id="case-3-tokens-without-rows"),
    pytest.param("abort", 3, encode_sglang(all_rows(tokens=TOKENS[: PROMPT_LEN + 3])), None, id="case-3-with-rows"),
    pytest.param("length", 4, None, "something between drops meta_info.routed_experts", id="case-49-field-lost"),
    pytest.param("stop", 4, TEXT, None, id="case-15-the-stop-token-is-kept"),
]  # fmt: skip


@pytest.mark.parametrize(("finish", "response", "payload", "message"), ANSWERS)
def test_answers_with_and_without_a_record(
    finish: Finish, response: int, payload: str | None, message: str | None
) -> None:
    found = outcome(finish, response, payload)
    assert (found is None) if message is None else (found is not None and message in str(found))


@pytest.mark.parametrize(
    ("begin", "message"),
    [
        pytest.param(7, None, id="case-5-from-the-last-token-of-the-turn-before"),
        pytest.param(8, "begins at position 8, the earlier one ends before 7", id="case-5-one-too-late"),
        pytest.param(3, None, id="case-5-earlier-rows-again"),
    ],
)
def test_where_a_later_turn_begins(begin: int, message: str | None) -> None:
    first_turn = TOKENS[:8]
    first = sglang(encode_sglang(all_rows(tokens=first_turn)), first_turn)
    later = sglang(encode_sglang(all_rows()[begin:]), start=begin)
    if message is None:
        assert next_start(first) == 7
        whole = merge_turns(first, later, TOKENS)
        np.testing.assert_array_equal(whole.experts, moe_rows())
        whole.verify(TOKENS)
        assert [tuple(span) for span in whole.spans] == [(0, 11, 3)]
    else:
        with pytest.raises(RoutingError, match=message):
            merge_turns(first, later, TOKENS)


@pytest.mark.parametrize(
    "several", [pytest.param([[], []], id="case-13-lightllm"), pytest.param([{}, {}], id="case-13-vllm")]
)
def test_several_answers_to_one_request_are_refused(several: list[Any], tmp_path: Any) -> None:
    from r3.config import Config
    from r3.rollout.engine import open_engine
    from tests.engines.wire_server import serving
    from tests.engines.wire_server_lightllm import LightllmWire
    from tests.engines.wire_server_vllm import VllmWire
    from tests.tiny_model import write_files

    directory = write_files(tmp_path / "model")
    model = ModelSpec.from_directory(directory)
    if several == [{}, {}]:
        name, wire = "vllm_http", VllmWire(model, changes={"choices": several})
    else:
        name, wire = "lightllm_http", LightllmWire(model, changes={"tokens": several})
    with serving(wire) as server, pytest.raises(EngineError, match="n=1 was asked for"):
        open_engine(Config.model_validate({"rollout": {"engine": name, "urls": [server.url]}}), directory, 0)
    (_, _, body) = server.seen[-1]
    assert (body.get("parameters") or body["sampling_params"])["n"] == 1
