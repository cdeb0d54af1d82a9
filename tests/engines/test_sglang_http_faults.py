"""What the adapter of SGLang servers does when one misbehaves; the servers speak the forms, no engine is started."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3.config import Config
from r3.errors import ConfigError, EngineError
from r3.rollout.engine import Engine, Request, Sampling, open_engine
from r3.types import ModelSpec
from r3.weights import TensorSlot, WeightBucket, WeightBuckets
from tests.engines.wire_server import Body, WireServer, made_up_experts, serving
from tests.engines.wire_server_sglang import SglangWire
from tests.tiny_model import write_files

REQUEST = Request(np.array([5, 6, 7], dtype=np.int32))
SAMPLING = Sampling(1.0, 4)
FLOATS = np.arange(6, dtype=np.float32)
WEIGHTS = WeightBuckets(
    3, (WeightBucket((TensorSlot("lm_head.weight", "float32", (2, 3), 0, 24),), FLOATS.view(np.uint8)),)
)
Start = Callable[..., tuple[Engine, list[WireServer]]]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_files(tmp_path / "model")


@pytest.fixture
def wire(directory: Path) -> SglangWire:
    return SglangWire(ModelSpec.from_directory(directory), str(directory))


@pytest.fixture
def start(directory: Path) -> Iterator[Start]:
    with ExitStack() as stack:

        def begin(*wires: SglangWire, tree: dict[str, Any] | None = None, **rollout: Any) -> Any:
            servers = [stack.enter_context(serving(wire)) for wire in wires]
            settings = {"engine": "sglang_http", "urls": [server.url for server in servers], "dtype": "float32"}
            sections = {"rollout": settings | {"http_retries": 2} | rollout}
            engine = open_engine(Config.model_validate(sections | (tree or {})), directory, 0)
            stack.callback(engine.close)
            for server in servers:
                server.seen.clear()
            return engine, servers

        yield begin


def test_a_stock_server_leaves_provenance_unknown_and_says_why(start: Start, wire: SglangWire) -> None:
    engine, _ = start(wire)
    spec = engine.spec()
    assert spec.provenance == "unknown"
    assert spec.unstamped.startswith("sglang 0.5.23 stamps no rows; install this package where the server runs")


def test_required_provenance_refuses_a_stock_server(start: Start, wire: SglangWire) -> None:
    with pytest.raises(ConfigError, match=r"routing\.provenance is require, but sglang 0\.5\.\d+ stamps no rows"):
        start(wire, tree={"routing": {"provenance": "require"}})


def test_an_abort_in_the_queue_says_that_its_rows_are_gone(start: Start, wire: SglangWire) -> None:
    engine, _ = start(wire)

    def abort(answer: Body, body: Body) -> None:
        answer["meta_info"]["finish_reason"] = {"type": "abort"}
        del answer["meta_info"]["routed_experts"]

    wire.change = abort
    (found,) = engine.generate([REQUEST], SAMPLING, capture=True)
    assert found.finish == "abort"
    assert "aborted in the queue with 4 tokens sampled" in str(found.defect)


REPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "no capture": ({"enable_return_routed_experts": False}, "start it with --enable-return-routed-experts"),
    "speculation": ({"speculative_algorithm": "EAGLE"}, "--speculative-algorithm 'EAGLE', which is refused: the captu"),
    "pipeline stages": ({"pp_size": 2}, "--pp-size 2, which is refused: each pipeline stage"),
    "tiered cache": ({"enable_hierarchical_cache": True}, "--enable-hierarchical-cache True, which is refused"),
    "a tokenizer": ({"skip_tokenizer_init": False}, "--skip-tokenizer-init False, which is refused"),
    "several replicas": ({"dp_size": 2}, "--dp-size 2, which is refused"),
    "a routing kernel": ({"moe_runner_backend": "flashinfer_trtllm"}, "bypasses the capture"),
    "another dtype": ({"dtype": "bfloat16"}, "--dtype bfloat16, rollout.dtype is float32"),
}


@pytest.mark.parametrize(("info", "message"), REPORTED.values(), ids=REPORTED)
def test_options_that_break_the_capture_are_found_at_the_handshake(
    start: Start, wire: SglangWire, info: dict[str, Any], message: str
) -> None:
    wire.info = info
    with pytest.raises(EngineError, match=message) as caught:
        start(wire)
    assert caught.value.exit_code == 4


def test_options_of_the_in_process_engine_alone_pass(start: Start, wire: SglangWire) -> None:
    wire.info = {"nnodes": 2, "tokenizer_worker_num": 4}
    start(wire)


def test_deterministic_runs_need_a_deterministic_server(start: Start, wire: SglangWire) -> None:
    tree = {"run": {"deterministic": True}}
    with pytest.raises(EngineError, match=r"lacks --enable-deterministic-inference, which run\.deterministic needs"):
        start(wire, tree=tree)
    wire.info = {"enable_deterministic_inference": True}
    engine, (server,) = start(wire, tree=tree)
    engine.generate([REQUEST], SAMPLING, capture=True)
    assert [path for _, path, _ in server.seen] == ["/flush_cache", "/generate"]


@pytest.mark.parametrize("version", ["0.5.16", "0.6.0"])
def test_releases_that_are_not_known_are_refused(start: Start, wire: SglangWire, version: str) -> None:
    wire.info = {"version": version}
    with pytest.raises(ConfigError, match=r"0\.5\.17 to 0\.5\.23 are supported"):
        start(wire)


def test_a_model_of_another_kind_is_found_without_its_files(start: Start, wire: SglangWire) -> None:
    wire.model_info = {"model_path": "/of/another/host", "model_type": "mixtral"}
    with pytest.raises(ConfigError, match=r"serves a 'mixtral', model\.path is a 'qwen3_moe'"):
        start(wire)


def test_a_fresh_server_is_given_version_0(start: Start, wire: SglangWire) -> None:
    wire.version = "default"
    start(wire)
    assert wire.version == "0"


def test_weights_that_nobody_knows_are_loaded_anew(start: Start, wire: SglangWire) -> None:
    wire.version = "37"
    engine, _ = start(wire)
    assert (wire.version, engine.generate([REQUEST], SAMPLING, capture=True)[0].weight_version) == ("0", 0)

    wire.version, wire.loads = "37", False
    with pytest.raises(EngineError, match=r"status 400: .*Failed to get weights iterator.*weights\.exchange_dir"):
        start(wire)


def test_two_servers_share_the_load(start: Start, directory: Path, wire: SglangWire) -> None:
    engine, servers = start(wire, SglangWire(wire.model, str(directory)))
    prompts = [Request(np.arange(5, 7 + n, dtype=np.int32)) for n in range(6)]
    answers = engine.generate(prompts, SAMPLING, capture=True)
    for request, answer in zip(prompts, answers, strict=True):
        np.testing.assert_array_equal(answer.tokens[:-4], request.tokens)
        np.testing.assert_array_equal(answer.routing.experts, made_up_experts(answer.tokens, range(4), wire.model))
    assert [len(server.bodies("/generate")) for server in servers] == [3, 3]

    engine.load_weights(WEIGHTS, 3)
    assert [len(server.bodies("/update_weights_from_disk")) for server in servers] == [1, 1]
    assert {answer.weight_version for answer in engine.generate(prompts, SAMPLING, capture=True)} == {3}


def test_prompts_that_repeat_are_computed_once_before_their_samples(start: Start, wire: SglangWire) -> None:
    engine, (server,) = start(wire)
    engine.generate([REQUEST, REQUEST, REQUEST], SAMPLING, capture=True)
    sent = [
        (body["sampling_params"]["max_new_tokens"], "return_routed_experts" in body)
        for body in server.bodies("/generate")
    ]
    assert sent == [(1, False)] + [(4, True)] * 3


@pytest.mark.parametrize("honours", [True, False])
def test_later_rows_alone_whatever_the_server_makes_of_it(start: Start, wire: SglangWire, honours: bool) -> None:
    wire.honours_start = honours
    engine, (server,) = start(wire)
    (answer,) = engine.generate([Request(REQUEST.tokens, 2)], SAMPLING, capture=True)
    assert engine.spec().recorded.honours_start is honours
    assert answer.wire == ("int32", 2 if honours else 0, False)
    assert [tuple(span) for span in answer.routing.spans] == [(2, 6, 0)]
    assert server.bodies("/generate")[-1]["routed_experts_start_len"] == 2


def test_rows_that_two_dtypes_would_fit_are_read_in_that_of_the_probe(start: Start, wire: SglangWire) -> None:
    """One row of int32 has the bytes of four rows of uint8, as many as there are from the first token on."""
    wire.honours_start = True
    engine, _ = start(wire)
    (answer,) = engine.generate([Request(REQUEST.tokens, 3)], Sampling(1.0, 2), capture=True)
    assert answer.defect is None
    assert answer.wire == ("int32", 3, False)
    assert [tuple(span) for span in answer.routing.spans] == [(3, 4, 0)]


def test_a_server_that_stumbles_is_asked_again(start: Start, wire: SglangWire) -> None:
    engine, (server,) = start(wire)
    wire.failures = [(503, b"busy"), (500, b"broken")]
    assert engine.generate([REQUEST], SAMPLING, capture=True)[0].defect is None
    assert len(server.seen) == 3


def test_a_server_that_stays_down_is_an_error_with_its_words(start: Start, wire: SglangWire) -> None:
    engine, (server,) = start(wire)
    wire.failures = [(503, b"out of  memory")] * 9
    with pytest.raises(EngineError, match=r"/generate failed 3 times .*status 503: out of memory"):
        engine.generate([REQUEST], SAMPLING, capture=True)
    assert len(server.seen) == 3


def test_a_refusal_is_not_asked_again(start: Start, wire: SglangWire) -> None:
    engine, (server,) = start(wire)
    wire.failures = [(400, {"error": {"message": "too long"}})]
    with pytest.raises(EngineError, match=r"status 400.*too long"):
        engine.generate([REQUEST], SAMPLING, capture=True)
    assert len(server.seen) == 1


def test_no_server_at_all(start: Start) -> None:
    with socket.socket() as bound:  # and nobody listens
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(EngineError, match=r"/server_info failed 1 times .*is the server running\?"):
            start(urls=[f"http://127.0.0.1:{bound.getsockname()[1]}"], http_retries=0)


def edit(**changes: Any) -> Callable[[Body, Body], None]:
    return lambda answer, body: answer["meta_info"].update(changes)


ANSWERS: dict[str, tuple[Callable[[Body, Body], None], str]] = {
    "other weights": (edit(weight_version="4"), "answered with weights '4', loaded are 0"),
    "log-probs of other tokens": (edit(output_token_logprobs=[[-1, 2, None]]), "not the 4 sampled ones"),
    "unknown finish": (edit(finish_reason={"type": "shrug"}), "finish reason 'shrug'"),
    "no meta_info": (lambda answer, body: answer.pop("meta_info"), "answered without 'meta_info'"),
}


@pytest.mark.parametrize(("change", "message"), ANSWERS.values(), ids=ANSWERS)
def test_answers_that_break_the_contract_are_refused(
    start: Start, wire: SglangWire, change: Callable[[Body, Body], None], message: str
) -> None:
    engine, _ = start(wire)
    wire.change = change
    with pytest.raises(EngineError, match=message):
        engine.generate([REQUEST], SAMPLING, capture=True)


def test_a_record_that_is_lost_on_the_way_is_a_defect_of_its_sample(start: Start, wire: SglangWire) -> None:
    engine, _ = start(wire)
    wire.change = lambda answer, body: (
        answer["meta_info"].pop("routed_experts") if len(body["input_ids"]) == 3 else None
    )
    lost, kept = engine.generate([REQUEST, Request(REQUEST.tokens[:2])], SAMPLING, capture=True)
    assert "something between drops meta_info.routed_experts" in str(lost.defect)
    assert (kept.defect, kept.routing.rows) == (None, 5)


def test_a_flush_is_repeated_until_it_holds(start: Start, wire: SglangWire) -> None:
    engine, (server,) = start(wire)
    wire.refused_flushes = 3
    engine.flush_cache()
    assert len(server.seen) == 4


def test_weights_without_a_flush_leave_an_engine_that_does_not_answer(start: Start, wire: SglangWire) -> None:
    engine, _ = start(wire, tree={"weights": {"flush_timeout_s": 0.2}})
    wire.refused_flushes = 10**9
    with pytest.raises(EngineError, match=r"refused to flush its cache for 0.2 s \(weights.flush_timeout_s\)"):
        engine.load_weights(WEIGHTS, 3)
    with pytest.raises(EngineError, match="half-loaded weights"):
        engine.generate([REQUEST], SAMPLING, capture=True)


def test_a_version_that_did_not_stick_is_found(start: Start, wire: SglangWire) -> None:
    engine, _ = start(wire)
    wire.model_info = {"weight_version": "2"}
    with pytest.raises(EngineError, match="says that it holds weights '2' after it was given version 3"):
        engine.load_weights(WEIGHTS, 3)


def test_weights_travel_as_a_checkpoint_that_is_gone_afterwards(
    start: Start, wire: SglangWire, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.numpy import load_file

    shared = tmp_path / "shared"
    shared.mkdir()
    engine, (server,) = start(wire, tree={"weights": {"exchange_dir": str(shared)}})
    files: list[Any] = []
    original = SglangWire.__call__

    def look(self: SglangWire, method: str, path: str, body: Body) -> Any:
        if path == "/update_weights_from_disk":
            sent = Path(body["model_path"])
            files.append((sorted(file.name for file in sent.iterdir()), load_file(next(sent.glob("*.safetensors")))))
        return original(self, method, path, body)

    monkeypatch.setattr(SglangWire, "__call__", look)
    engine.load_weights(WEIGHTS, 3)
    ((names, tensors),) = files
    assert names == ["config.json", "model-00001-of-00001.safetensors"]
    np.testing.assert_array_equal(tensors["lm_head.weight"], FLOATS.reshape(2, 3))
    assert list(shared.iterdir()) == []
    (body,) = server.bodies("/update_weights_from_disk")
    assert (body["weight_version"], body["flush_cache"]) == ("3", False)
    shared.rmdir()
    with pytest.raises(EngineError, match=r"exchange_dir=.* is no directory"):
        engine.load_weights(WEIGHTS, 4)


def test_rows_that_went_to_another_process_are_named(start: Start, wire: SglangWire) -> None:
    def leave_a_ticket(answer: Body, body: Body) -> None:
        if answer["meta_info"].pop("routed_experts", None) is not None:
            answer["meta_info"]["r3_routing"] = [None] * (len(answer["output_ids"]) - 1) + [[1, 64, 0, 6]]

    engine, _ = start(wire)
    wire.change = leave_a_ticket
    (answer,) = engine.generate([REQUEST], SAMPLING, capture=True)
    assert answer.routing is None
    assert "left its rows in shared memory of another process" in str(answer.defect)
    with pytest.raises(EngineError, match="left its rows in shared memory of another process"):
        start(wire)


def test_shared_memory_of_another_process_cannot_be_required(start: Start, wire: SglangWire) -> None:
    with pytest.raises(ConfigError, match=r"shared_memory is require, but sglang 0.5.23: the engine sends its rows"):
        start(wire, tree={"routing": {"shared_memory": "require"}})
    engine, _ = start(wire)
    spec = engine.spec()
    assert not spec.shared_memory
    assert spec.describe_rows().endswith("rows come with the answers (the engine sends its rows with its answers)")
