"""The adapter of SGLang servers against the real server on the CPU, and that against the reference."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from r3.errors import ConfigError, EngineError
from r3.rollout.engine import Engine, Generation, Request, Sampling, check_generation, open_engine
from r3.rollout.turns import merge_turns, next_start
from r3.routing import Span
from r3.types import ModelSpec
from tests.engines import reference
from tests.engines.sglang_server import RunningServer, running
from tests.engines.test_sglang import assert_same_experts, buckets, requests
from tests.real_engine import engine_config
from tests.tiny_model import EOS, write_files

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(model_a: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("server") / "log"
    # Prompts are longer than a chunk, so that every test is one of chunked prefill too.
    options = ("--enable-return-routed-experts", "--max-running-requests=64", "--chunked-prefill-size=16")
    with running(model_a, log, *options) as server:
        yield server


@pytest.fixture(scope="module")
def engine(server: RunningServer, model_a: Path) -> Iterator[Engine]:
    engine = open_engine(config(server.url), model_a, 0)
    yield engine
    engine.close()


def config(*urls: str, **rollout: Any) -> Any:
    return engine_config(engine="sglang_http", urls=urls, http_retries=1, **rollout)


def generate(engine: Engine, prompts: list[Request], **options: Any) -> list[Generation]:
    return engine.generate(prompts, Sampling(1.0, 12, (EOS,), **options), capture=True)


def test_the_handshake_describes_the_server(engine: Engine, model_a: Path) -> None:
    spec = engine.spec()
    assert spec.model == ModelSpec.from_directory(model_a)
    assert spec.engine.startswith("sglang 0.5.")
    assert (spec.capture, spec.updates, spec.dtype) == (True, "directory", "float32")
    found = spec.recorded
    assert (found.layers, found.num_experts, found.top_k) == ((0, 1, 2, 3), 16, 4)
    assert (found.wire_dtype, found.honours_start, found.cached_rows) == ("int32", True, True)


def test_a_server_with_the_plugin_proves_who_wrote_its_rows(engine: Engine) -> None:
    spec = engine.spec()
    assert (spec.provenance, spec.unstamped, spec.recorded.provenance) == ("exact", "", "exact")
    for answer in generate(engine, requests(4, seed=6)):
        assert answer.defect is None
        assert (answer.routing.provenance, answer.stale) == ("exact", ())
        assert answer.routing.spans == (Span(0, len(answer.tokens) - 1, answer.weight_version),)


def test_stamps_are_left_unread_where_they_are_switched_off(server: RunningServer, model_a: Path) -> None:
    engine = open_engine(engine_config({"provenance": "off"}, engine="sglang_http", urls=(server.url,)), model_a, 0)
    assert (engine.spec().provenance, engine.spec().unstamped) == ("unknown", "routing.provenance is off")
    (answer,) = generate(engine, requests(1, seed=7))
    assert answer.routing.provenance == "unknown"
    engine.close()


def test_log_probs_and_experts_are_those_of_the_reference(engine: Engine, model_a: Path) -> None:
    prompts = [prompt for prompt in requests(16, seed=1) for _ in range(2)]
    answers = generate(engine, prompts)

    for request, answer in zip(prompts, answers, strict=True):
        assert check_generation(request, answer, engine.spec(), capture=True) is None
        answer.routing.verify(answer.tokens)
        expected = reference.logprobs(reference.forward(model_a, answer.tokens), answer.tokens, answer.prompt_len, 1.0)
        np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4, rtol=0)
    assert_same_experts(model_a, answers)


def test_a_second_turn_asks_for_its_own_rows_alone(engine: Engine, model_a: Path) -> None:
    first = generate(engine, requests(4, seed=2))
    prompts = [
        Request(np.append(a.tokens, [9, 8]).astype(np.int32), routing_start=next_start(a.routing)) for a in first
    ]
    second = generate(engine, prompts)

    for before, request, after in zip(first, prompts, second, strict=True):
        assert check_generation(request, after, engine.spec(), capture=True) is None
        assert after.wire.begin == request.routing_start == len(before.tokens) - 1
        whole = merge_turns(before.routing, after.routing, after.tokens)
        assert whole.rows == len(after.tokens) - 1
        found = reference.forward(model_a, after.tokens[:-1])
        differs = (np.sort(whole.experts, axis=-1) != found.experts).any(axis=-1)
        assert not (differs & (found.margins > 1e-5)).any()


def test_new_weights_change_the_answers_and_their_version(engine: Engine, model_a: Path, model_b: Path) -> None:
    prompts = requests(3, seed=3)
    expected = {m: [reference.greedy(m, request.tokens, 12) for request in prompts] for m in (model_a, model_b)}

    def answers() -> tuple[list[Generation], list[list[int]]]:
        found = generate(engine, prompts, greedy=True, ignore_eos=True)
        return found, [answer.tokens[answer.prompt_len :].tolist() for answer in found]

    assert answers()[1] == expected[model_a]
    engine.load_weights(buckets(model_b, 5, tensors_per_bucket=50), 5)
    found, tokens = answers()
    assert tokens == expected[model_b]
    assert {answer.weight_version for answer in found} == {5}
    assert {span.weight_version for answer in found for span in answer.routing.spans} == {5}
    assert [answer.cached_tokens for answer in found] == [0] * len(prompts), "prefixes of the old weights were kept"
    assert_same_experts(model_b, found)

    engine.load_weights(model_a, 6)
    found, tokens = answers()
    assert (tokens, {answer.weight_version for answer in found}) == (expected[model_a], {6})


def test_weights_of_an_earlier_run_are_replaced_at_the_start(
    engine: Engine, server: RunningServer, model_a: Path, model_b: Path
) -> None:
    engine.load_weights(buckets(model_b, 7, tensors_per_bucket=50), 7)
    another = open_engine(config(server.url), model_a, 0)
    (answer,) = generate(another, requests(1, seed=4), greedy=True, ignore_eos=True)
    another.close()
    assert answer.weight_version == 0
    assert answer.tokens[answer.prompt_len :].tolist() == reference.greedy(model_a, requests(1, seed=4)[0].tokens, 12)
    with pytest.raises(EngineError, match="answered with weights '0', loaded are 7"):
        generate(engine, requests(1, seed=4))
    engine.load_weights(model_a, 8)


def test_another_checkpoint_is_refused_before_anything_is_asked(
    server: RunningServer, engine: Engine, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"model\.path and .* hold different models \(num_experts"):
        open_engine(config(server.url), write_files(tmp_path / "other", num_experts=32), 0)
    with pytest.raises(ConfigError, match="num_experts"):
        engine.load_weights(tmp_path / "other", 9)
    assert_is_refusing(engine)


def assert_is_refusing(engine: Engine) -> None:
    with pytest.raises(EngineError, match="half-loaded weights"):
        generate(engine, requests(1, seed=5))


def test_a_directory_without_weights_is_refused_with_the_servers_words(
    engine: Engine, model_a: Path, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=r"(?s)weights.*weights\.exchange_dir names a shared directory"):
        engine.load_weights(write_files(tmp_path / "empty"), 9)
    assert_is_refusing(engine)
    engine.load_weights(model_a, 10)
    assert generate(engine, requests(1, seed=5))[0].weight_version == 10


def test_a_prompt_that_does_not_fit_is_refused_with_the_servers_words(engine: Engine) -> None:
    with pytest.raises(EngineError, match=r"/generate answered with status 400: .*longer"):
        generate(engine, [Request(np.full(5000, 7, dtype=np.int32))])


def test_options_that_the_server_tells_are_read(server: RunningServer) -> None:
    told = httpx.get(f"{server.url}/server_info", trust_env=False).json()
    from r3.rollout.engines.sglang_args import REFUSALS

    unknown = {refusal.option for refusal in REFUSALS} - set(told)
    assert unknown == set(), "a refusal names an option that this release does not have"
    assert re.match(r"0\.5\.\d+", told["version"])


def test_a_server_that_dies_is_an_error_after_the_retries(
    server: RunningServer, engine: Engine, model_a: Path
) -> None:  # the last test: it ends the server
    assert len(generate(engine, requests(2, seed=6))) == 2
    server.kill()
    with pytest.raises(EngineError, match=r"/generate failed 2 times \(rollout\.http_retries\).*is the server running"):
        generate(engine, requests(2, seed=6))
