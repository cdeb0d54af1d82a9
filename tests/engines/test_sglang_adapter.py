"""What the SGLang adapter does when SGLang misbehaves: a stand-in answers in SGLang's forms, no engine is started."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from r3.config import Config, RunConfig
from r3.errors import ConfigError, EngineError
from r3.rollout.engine import Generation, Request, Sampling, check_generation
from r3.rollout.engines import sglang
from r3.rollout.engines.sglang_args import REFUSALS, check_engine_args, check_environment, check_release, engine_kwargs
from r3.rollout.wire.common import Wire
from r3.weights import WeightBuckets
from tests.tiny_model import write_files

REQUEST = Request(np.array([5, 6, 7], dtype=np.int32))
SAMPLING = Sampling(1.0, 4)
ROWS, LAYERS, TOP_K = 4, 4, 4  # three prompt and two response tokens


class StubEngine:
    """SGLang's calls and their return forms; the attributes are set by the tests."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.sampling_params: list[dict[str, Any]] = []
        self.prompts: list[list[list[int]]] = []
        self.meta: dict[str, Any] = {}
        self.refused_flushes = 0
        self.options: dict[str, Any] = {}
        self.begin: tuple[bool, str] = (True, "Success")
        self.events: list[str] = []
        watchdog = SimpleNamespace(_names=[], _processes=[], _stop_event=threading.Event())
        self.tokenizer_manager = SimpleNamespace(_subprocess_watchdog=watchdog)

    def generate(
        self, input_ids: list[list[int]], sampling_params: list[dict[str, Any]], **options: Any
    ) -> list[dict[str, Any]]:
        self.sampling_params = sampling_params
        self.options = options
        self.prompts.append(input_ids)
        routing = np.tile(np.arange(TOP_K, dtype=np.int32), (ROWS, LAYERS, 1))
        meta = {
            "output_token_logprobs": [(-0.1, 8, None), (-0.2, 9, None)],
            "finish_reason": {"type": "length"},
            "weight_version": self.arguments["weight_version"],
            "cached_tokens": 2,
        }
        if options.get("return_routed_experts"):
            meta["routed_experts"] = base64.b64encode(routing.tobytes()).decode()
        meta = {key: value for key, value in (meta | self.meta).items() if value is not None}
        return [{"output_ids": [8, 9], "meta_info": meta} for _ in input_ids]

    def begin_weight_update(self) -> tuple[bool, str]:
        return self.begin

    def end_weight_update(self) -> tuple[bool, str]:
        return True, "Success"

    def flush_cache(self) -> Any:
        self.refused_flushes -= 1
        return SimpleNamespace(success=self.refused_flushes < 0)

    def shutdown(self) -> None:
        self.events.append("shutdown")


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[sglang.SglangEngine]:
    monkeypatch.setattr(sglang, "_cpu_engine", lambda: (StubEngine, "0.5.23"))
    opened = sglang.SglangEngine(
        Config.model_validate({"weights": {"flush_timeout_s": 0.2}}), write_files(tmp_path / "model"), 3
    )
    yield opened
    opened.close()


def stub(adapter: sglang.SglangEngine) -> StubEngine:
    engine: StubEngine = adapter._engine
    return engine


def answer(adapter: sglang.SglangEngine, capture: bool = True) -> Generation:
    (found,) = adapter.generate([REQUEST], SAMPLING, capture=capture)
    return found


def test_an_answer_is_taken_over_exactly(adapter: sglang.SglangEngine) -> None:
    found = answer(adapter)

    assert found.tokens.tolist() == [5, 6, 7, 8, 9]
    assert found.tokens.dtype == np.int32
    np.testing.assert_allclose(found.logprobs, [-0.1, -0.2])
    assert (found.finish, found.weight_version, found.cached_tokens, found.defect) == ("length", 0, 2, None)
    assert found.routing.experts.shape == (ROWS, LAYERS, TOP_K)


@pytest.mark.parametrize("honours", [True, False])
def test_later_rows_are_asked_for_once_a_batch_and_cut_for_each_request(
    adapter: sglang.SglangEngine, honours: bool
) -> None:
    rows = np.tile(np.arange(TOP_K, dtype=np.int32), (ROWS - honours, LAYERS, 1))
    stub(adapter).meta = {"routed_experts": base64.b64encode(rows.tobytes()).decode()}
    first, second = (Request(REQUEST.tokens, start) for start in (1, 3))
    found = adapter.generate([first, second], SAMPLING, capture=True)

    assert stub(adapter).options["routed_experts_start_len"] == 1
    assert [answer.routing.spans[0][:2] for answer in found] == [(1, 4), (3, 4)]
    assert [answer.wire for answer in found] == [Wire("int32", 1 if honours else 0)] * 2
    for request, answer in zip((first, second), found, strict=True):
        assert check_generation(request, answer, adapter.spec(), capture=True) is None
        wrong = replace(request, routing_start=2)
        assert "are required" in str(check_generation(wrong, answer, adapter.spec(), capture=True))


def test_rows_that_two_dtypes_would_fit_are_sglangs_own(adapter: sglang.SglangEngine) -> None:
    """One row of int32 has the bytes of four rows of uint8, which come from the plugin's fallback alone."""
    row = np.tile(np.arange(TOP_K, dtype=np.int32), (1, LAYERS, 1))
    stub(adapter).meta = {"routed_experts": base64.b64encode(row.tobytes()).decode()}
    (found,) = adapter.generate([Request(REQUEST.tokens, ROWS - 1)], SAMPLING, capture=True)
    assert found.defect is None
    assert found.wire == Wire("int32", ROWS - 1)


def test_capture_that_is_off_at_the_engine_is_a_defect(adapter: sglang.SglangEngine) -> None:
    stub(adapter).meta = {"routed_experts": None}
    found = answer(adapter)

    assert found.routing is None
    assert "request 0: no routing came back" in str(found.defect)
    assert "enable_return_routed_experts" in str(found.defect)


def test_every_parameter_that_shapes_the_distribution_is_neutral(adapter: sglang.SglangEngine) -> None:
    answer(adapter)

    (sent,) = stub(adapter).sampling_params
    assert (sent["top_p"], sent["top_k"], sent["min_p"], sent["repetition_penalty"]) == (1.0, -1, 0.0, 1.0)
    assert (sent["frequency_penalty"], sent["presence_penalty"], sent["min_new_tokens"], sent["n"]) == (0.0, 0.0, 0, 1)


def test_a_seed_restarts_the_cpu_engine_and_gives_each_request_its_own(adapter: sglang.SglangEngine) -> None:
    seeded = replace(SAMPLING, seed=7)
    restarts: list[int] = []
    stub(adapter).reseed = restarts.append  # type: ignore[attr-defined]
    sent = []
    for sampling in (seeded, seeded, replace(SAMPLING, seed=8), SAMPLING):
        adapter.generate([REQUEST, REQUEST], sampling, capture=False)
        sent.append([one.get("sampling_seed") for one in stub(adapter).sampling_params])
    assert restarts == [7, 7, 8]
    assert sent[0] == sent[1]
    assert len({*sent[0], *sent[2]}) == 4
    assert sent[3] == [None, None]


def test_prompts_that_repeat_are_computed_once_before_their_samples(adapter: sglang.SglangEngine) -> None:
    other = Request(np.array([5, 6], dtype=np.int32))
    adapter.generate([REQUEST, other, REQUEST], SAMPLING, capture=False)
    assert stub(adapter).prompts == [[[5, 6], [5, 6, 7]], [[5, 6, 7], [5, 6], [5, 6, 7]]]

    stub(adapter).prompts.clear()
    adapter.generate([REQUEST, other], SAMPLING, capture=False)
    assert stub(adapter).prompts == [[[5, 6, 7], [5, 6]]]


ANSWERS = {
    "log-probs of other tokens": (
        {"output_token_logprobs": [(-0.1, 8, None), (-0.2, 3, None)]},
        "not the 2 sampled ones",
    ),
    "a log-prob missing": ({"output_token_logprobs": [(-0.1, 8, None)]}, "log-probs of 1 tokens"),
    "no log-probs": ({"output_token_logprobs": None}, "log-probs of 0 tokens"),
    "other weights": ({"weight_version": "4"}, "answered with weights '4', loaded are 0"),
    "unknown finish": ({"finish_reason": {"type": "shrug"}}, "finish reason 'shrug'"),
    "no finish": ({"finish_reason": None}, "finish reason None"),
}


@pytest.mark.parametrize(("meta", "message"), ANSWERS.values(), ids=ANSWERS)
def test_answers_that_break_the_contract_are_refused(
    adapter: sglang.SglangEngine, meta: dict[str, Any], message: str
) -> None:
    stub(adapter).meta = meta
    with pytest.raises(EngineError, match=message):
        answer(adapter)


def test_a_flush_is_repeated_until_it_holds(adapter: sglang.SglangEngine) -> None:
    stub(adapter).refused_flushes = 5
    adapter.flush_cache()
    assert stub(adapter).refused_flushes == -1


def test_weights_without_a_flush_leave_an_engine_that_does_not_answer(adapter: sglang.SglangEngine) -> None:
    stub(adapter).refused_flushes = 10**9
    with pytest.raises(EngineError, match=r"refused to flush its cache for 0.2 s \(weights.flush_timeout_s\)"):
        adapter.load_weights(WeightBuckets(1, ()), 1)
    with pytest.raises(EngineError, match="half-loaded weights"):
        answer(adapter)

    stub(adapter).refused_flushes = 0
    stub(adapter).meta = {"weight_version": "2"}
    adapter.load_weights(WeightBuckets(2, ()), 2)
    assert answer(adapter).weight_version == 2


def test_a_refused_update_session_carries_the_engines_message(adapter: sglang.SglangEngine) -> None:
    stub(adapter).begin = (False, "a weight-update session is already open")
    with pytest.raises(EngineError, match="begin_weight_update failed: a weight-update session is already open"):
        adapter.load_weights(WeightBuckets(1, ()), 1)


REFUSED = {
    "speculative_algorithm": "EAGLE",
    "pp_size": 2,
    "enable_hierarchical_cache": True,
    "enable_lmcache": True,
    "enable_flexkv": True,
    "enable_hisparse": True,
    "disaggregation_mode": "decode",
    "moe_runner_backend": "flashinfer_trtllm",
    "moe_a2a_backend": "mooncake",
    "chunked_prefill_size": -1,
    "enable_two_batch_overlap": True,
    "enable_pdmux": True,
    "attn_cp_size": 2,
    "enable_return_routed_experts": False,
    "enable_custom_logit_processor": True,
    "enable_watermark": True,
    "watermark_config": "w.json",
    "skip_tokenizer_init": False,
    "dp_size": 2,
    "nnodes": 2,
    "tokenizer_worker_num": 2,
}


def test_every_refusal_is_tried() -> None:
    assert set(REFUSED) == {refusal.option for refusal in REFUSALS}


@pytest.mark.parametrize(("option", "value"), REFUSED.items(), ids=REFUSED)
def test_arguments_that_break_capture_or_sampling_are_refused_with_the_reason(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"rollout.engine_args.{option}={value!r} is refused: (\S+ ){{4}}"):
        check_engine_args({option: value}, capture=True)


@pytest.mark.parametrize(
    "value", ["auto", "triton_kernel", "flashinfer_trtllm_routed", "flashinfer_mxfp4", "experimental_sgl_trtllm"]
)
def test_backends_that_route_inside_the_kernel_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="bypasses the capture"):
        check_engine_args({"moe_runner_backend": value}, capture=True)
    check_engine_args({"moe_runner_backend": value}, capture=False)


def test_harmless_values_and_other_arguments_pass() -> None:
    neutral = {"speculative_algorithm": None, "pp_size": 1, "disaggregation_mode": "null", "moe_a2a_backend": "none"}
    check_engine_args(neutral | {"moe_runner_backend": "triton", "chunked_prefill_size": 4096}, capture=True)
    check_engine_args({"enable_deterministic_inference": True}, capture=True)


def test_all_mistakes_are_reported_at_once_with_the_key_to_set_instead() -> None:
    with pytest.raises(ConfigError) as caught:
        check_engine_args({"dtype": "auto", "pp_size": 4}, capture=True)
    assert "engine_args.dtype is decided by rollout.dtype" in str(caught.value)
    assert "engine_args.pp_size=4 is refused" in str(caught.value)


def test_original_log_probs_are_refused() -> None:
    with pytest.raises(ConfigError, match="SGLANG_RETURN_ORIGINAL_LOGPROB"):
        check_environment({"SGLANG_RETURN_ORIGINAL_LOGPROB": "1"})
    check_environment({"SGLANG_RETURN_ORIGINAL_LOGPROB": "0"})
    check_environment({})


@pytest.mark.parametrize("version", ["0.5.17", "0.5.20.post1", "0.5.23"])
def test_supported_releases(version: str) -> None:
    check_release(version)


@pytest.mark.parametrize("version", ["0.4.9", "0.5.7", "0.5.16", "0.5.24", "0.6.0"])
def test_other_releases_are_refused(version: str) -> None:
    with pytest.raises(ConfigError, match=r"0\.5\.17 to 0\.5\.23 are supported"):
        check_release(version)


def test_arguments_of_cpu_and_gpu_engines() -> None:
    on_cpu = engine_kwargs(Config.model_validate({"run": {"seed": 10}}), "/model", 2)
    gpu = Config.model_validate(
        {"rollout": {"gpus_per_worker": 2, "max_total_tokens": None, "engine_args": {"attention_backend": "fa3"}}}
    )
    on_gpu = engine_kwargs(gpu, "/model", 0)

    assert (on_cpu["random_seed"], on_cpu["device"], on_cpu["attention_backend"]) == (12, "cpu", "torch_native")
    assert on_cpu["enable_return_routed_experts"]
    assert (on_gpu["tp_size"], on_gpu["moe_runner_backend"], on_gpu["attention_backend"]) == (2, "triton", "fa3")
    assert on_gpu["mem_fraction_static"] == 0.5
    assert not on_gpu["enable_deterministic_inference"]
    assert engine_kwargs(gpu.model_copy(update={"run": RunConfig(deterministic=True)}), "/model", 0)[
        "enable_deterministic_inference"
    ]
    assert "device" not in on_gpu
    assert "max_total_tokens" not in on_gpu


def test_an_engine_that_does_not_start_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**arguments: Any) -> None:
        raise RuntimeError("Rank 0 scheduler died during initialization")

    monkeypatch.setattr(sglang, "_cpu_engine", lambda: (broken, "0.5.23"))
    with pytest.raises(EngineError, match=r"sglang 0\.5\.23 did not start: Rank 0 scheduler died"):
        sglang.SglangEngine(Config(), write_files(tmp_path / "model"), 0)


def test_an_engine_without_its_processes_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(**arguments: Any) -> StubEngine:
        made.append(StubEngine(**arguments))
        del made[0].tokenizer_manager
        return made[0]

    made: list[StubEngine] = []
    monkeypatch.setattr(sglang, "_cpu_engine", lambda: (make, "0.5.23"))
    with pytest.raises(EngineError, match=r"0\.5\.23 does not hold its processes where .* 'tokenizer_manager'"):
        sglang.SglangEngine(Config(), write_files(tmp_path / "model"), 0)
    assert made[0].events == ["shutdown"]


@pytest.mark.parametrize("provenance", ["require", "off"])
def test_the_watch_ends_before_the_processes_do(
    provenance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watch(engine: StubEngine, name: str) -> SimpleNamespace:
        events.append(engine.events)
        return SimpleNamespace(stop=lambda: engine.events.append("stop"))

    events: list[list[str]] = []
    monkeypatch.setattr(sglang, "_cpu_engine", lambda: (StubEngine, "0.5.23"))
    monkeypatch.setattr(sglang, "watch_engine", watch)
    config = Config.model_validate({"routing": {"provenance": provenance}})
    # The stand-in has no plugin, so that it is refused where stamps are required.
    with pytest.raises(ConfigError) if provenance == "require" else nullcontext():
        sglang.SglangEngine(config, write_files(tmp_path / "model"), 0).close()
    assert events == [["stop", "shutdown"]]
