"""The adapters of LightLLM and vLLM against servers that speak their wire formats; no engine is started."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3.config import Config
from r3.errors import EngineError
from r3.rollout.engine import Engine, Request, Sampling, open_engine
from r3.types import ModelSpec
from r3.weights import WeightBuckets
from tests.engines.wire_server import WireServer, made_up_experts, serving
from tests.engines.wire_server_lightllm import LightllmWire
from tests.engines.wire_server_vllm import VllmWire
from tests.tiny_model import write_files

REQUESTS = [Request(np.arange(10, 10 + n, dtype=np.int32)) for n in (1, 5, 9)]
SAMPLING = Sampling(0.7, 4, (1,), seed=3)
Start = Callable[..., tuple[Engine, list[WireServer]]]


@pytest.fixture(
    params=[{}, {"num_experts": 300, "mlp_only_layers": [0, 2]}], ids=["small", "dense layers, 300 experts"]
)
def model_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_files(tmp_path / "model", **request.param)


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as stack:

        def begin(name: str, model_dir: Path, *wires: Any, **rollout: Any) -> tuple[Engine, list[WireServer]]:
            servers = [stack.enter_context(serving(wire)) for wire in wires]
            settings = {"engine": name, "urls": [server.url for server in servers], "http_retries": 0}
            engine = open_engine(Config.model_validate({"rollout": settings | rollout}), model_dir, 0)
            stack.callback(engine.close)
            return engine, servers

        yield begin


def check_answers(engine: Engine, model: ModelSpec) -> None:
    answers = engine.generate(REQUESTS, SAMPLING, capture=True)
    for request, answer in zip(REQUESTS, answers, strict=True):
        assert answer.defect is None
        np.testing.assert_array_equal(answer.tokens, np.append(request.tokens, [5, 6, 7, 8]))
        np.testing.assert_array_equal(answer.routing.experts, made_up_experts(answer.tokens, model.moe_layers, model))
        answer.routing.verify(answer.tokens)
        assert (answer.finish, answer.weight_version, answer.prompt_len) == ("length", 0, len(request.tokens))
        np.testing.assert_array_equal(answer.logprobs, np.full(4, -0.5, np.float32))


@pytest.mark.parametrize("layout", ["newest", "first", "documented"])
def test_lightllm_in_every_layout(model_dir: Path, start: Start, layout: Any) -> None:
    model = ModelSpec.from_directory(model_dir)
    engine, (server,) = start("lightllm_http", model_dir, LightllmWire(model, layout))
    check_answers(engine, model)

    spec = engine.spec()
    assert (spec.capture, spec.updates, spec.recorded.honours_start) == (True, "none", False)
    sent = server.bodies("/generate")[-1]["parameters"]
    assert (sent["n"], sent["return_details"], sent["temperature"], sent["stop_sequences"]) == (1, True, 0.7, [[1]])


@pytest.mark.parametrize("honours", [True, False])
def test_vllm_and_later_rows(model_dir: Path, start: Start, honours: bool) -> None:
    model = ModelSpec.from_directory(model_dir)
    engine, (server,) = start("vllm_http", model_dir, VllmWire(model, honours_start=honours))
    check_answers(engine, model)

    spec = engine.spec()
    assert (spec.engine, spec.updates) == ("vllm 0.33.0", "none")
    assert (spec.recorded.honours_start, spec.recorded.wire_dtype) == (
        honours, "uint8" if model.num_experts <= 256 else "uint16",
    )  # fmt: skip
    (answer,) = engine.generate([Request(REQUESTS[2].tokens, 4)], SAMPLING, capture=True)
    whole = made_up_experts(answer.tokens, model.moe_layers, model)
    np.testing.assert_array_equal(answer.routing.experts, whole[4:])
    assert answer.routing.spans[0].begin == 4
    sent = server.bodies("/inference/v1/generate")[-1]["sampling_params"]
    assert (sent["n"], sent["logprobs"], sent["routed_experts_prompt_start"]) == (1, 0, 4)


def test_samples_of_a_group_have_seeds_of_their_own(model_dir: Path, start: Start) -> None:
    engine, (server,) = start("vllm_http", model_dir, VllmWire(ModelSpec.from_directory(model_dir)))
    for _ in range(2):
        engine.generate([REQUESTS[0]] * 3, SAMPLING, capture=False)
    sent = [body["sampling_params"].get("seed") for body in server.bodies("/inference/v1/generate")][-6:]
    assert len(set(sent[:3])) == 3
    assert set(sent[:3]) == set(sent[3:])


def test_two_servers_share_the_requests_and_answers_keep_their_order(model_dir: Path, start: Start) -> None:
    model = ModelSpec.from_directory(model_dir)
    engine, servers = start("lightllm_http", model_dir, LightllmWire(model), LightllmWire(model))
    for server in servers:
        server.seen.clear()
    requests = [Request(np.arange(10, 12 + n, dtype=np.int32)) for n in range(7)]
    answers = engine.generate(requests, SAMPLING, capture=True)
    assert [answer.prompt_len for answer in answers] == [2 + n for n in range(7)]
    assert sorted(len(server.seen) for server in servers) == [3, 4]


WRONG = {
    "lightllm without capture": ("lightllm_http", LightllmWire, {"capture": False}, "--enable_return_routed_experts"),
    "vllm without capture": ("vllm_http", VllmWire, {"capture": False}, "--enable-return-routed-experts"),
    "vllm that does not say": (
        "vllm_http", VllmWire, {"capture": False, "development": False}, "--enable-return-routed-experts",
    ),
    "vllm with log-probs of another distribution": (
        "vllm_http", VllmWire, {"options": {"logprobs_mode": "raw_logprobs"}}, "--logprobs-mode processed_logprobs",
    ),
    "lightllm with several answers": (
        "lightllm_http", LightllmWire, {"changes": {"tokens": [[], []]}}, "several answers",
    ),
    "lightllm that tokenizes anew": ("lightllm_http", LightllmWire, {"changes": {"prompt_tokens": 25}}, "as they are"),
    "lightllm without details": ("lightllm_http", LightllmWire, {"changes": {"tokens": None}}, "without 'tokens'"),
    "vllm with log-probs of other tokens": (
        "vllm_http", VllmWire, {"changes": {"token_ids": [9, 9]}}, "not the 2 sampled ones",
    ),
    "vllm with several answers": ("vllm_http", VllmWire, {"changes": {"choices": [{}, {}]}}, "n=1 was asked for"),
    "an id outside the vocabulary": ("lightllm_http", LightllmWire, {"changes": {
        "tokens": [{"id": 320, "logprob": -1.0}]}}, "outside the vocabulary"),
    "an id that is text": ("lightllm_http", LightllmWire, {"changes": {
        "tokens": [{"id": "5", "logprob": -1.0}]}}, "not all numbers"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "wire", "options", "message"), WRONG.values(), ids=WRONG)
def test_the_handshake_finds_what_is_wrong(
    tmp_path: Path, start: Start, name: str, wire: Any, options: dict[str, Any], message: str
) -> None:
    model_dir = write_files(tmp_path / "model")
    with pytest.raises(EngineError, match=message) as caught:
        start(name, model_dir, wire(ModelSpec.from_directory(model_dir), **options))
    assert caught.value.exit_code == 4


def test_another_model_behind_the_server_is_found(tmp_path: Path, start: Start) -> None:
    other = ModelSpec.from_directory(write_files(tmp_path / "other", num_hidden_layers=6))
    with pytest.raises(EngineError, match=r"shape.*Serve the checkpoint of model\.path"):
        start("vllm_http", write_files(tmp_path / "model"), VllmWire(other))


def test_weight_updates_are_refused_with_the_reason(model_dir: Path, start: Start) -> None:
    engine, _ = start("vllm_http", model_dir, VllmWire(ModelSpec.from_directory(model_dir)))
    with pytest.raises(EngineError, match="vllm_http is generation only"):
        engine.load_weights(WeightBuckets(1, ()), 1)


def test_a_run_without_capture_needs_no_record(model_dir: Path, start: Start) -> None:
    wire = LightllmWire(ModelSpec.from_directory(model_dir), capture=False)
    with serving(wire) as server:
        config = Config.model_validate(
            {
                "rollout": {"engine": "lightllm_http", "urls": [server.url]},
                "routing": {"capture": False},
                "replay": {"mode": "none"},
            }
        )
        engine = open_engine(config, model_dir, 0)
        (answer,) = engine.generate(REQUESTS[:1], SAMPLING, capture=False)
        engine.close()
    assert (answer.routing, answer.defect, engine.spec().capture) == (None, None, False)
