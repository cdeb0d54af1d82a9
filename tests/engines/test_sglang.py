"""Real SGLang on the CPU against an independent Hugging Face forward, both in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3.rollout.engine import EngineSpec, Generation, Request, Sampling, check_generation
from r3.rollout.sglang_plugin.tickets import TICKET_KEY
from r3.rollout.turns import merge_turns, next_start
from r3.types import ModelSpec, Prompt
from r3.weights import TensorSlot, WeightBucket, WeightBuckets
from tests.engines import reference
from tests.real_engine import engine_config
from tests.tiny_model import EOS, VOCAB_SIZE

pytestmark = pytest.mark.engine

Worker = Callable[..., Any]
NEAR_TIE = 1e-5


def requests(count: int, seed: int) -> list[Request]:
    """Random prompts of 1 to 40 tokens, no two alike in their first one."""
    generator = np.random.default_rng(seed)
    return [
        Request(
            np.concatenate([[2 + i], generator.integers(2, VOCAB_SIZE, generator.integers(0, 40))]).astype(np.int32)
        )
        for i in range(count)
    ]


def generate(worker: Worker, prompts: Sequence[Request], temperature: float = 1.0, **options: Any) -> list[Generation]:
    sampling = Sampling(temperature, 12, (EOS,), **options)
    return worker("engine", "generate", prompts, sampling, capture=True)


def assert_same_experts(model: Path, answers: Sequence[Generation]) -> None:
    """Every recorded row has the reference's expert set, near-ties aside, of which there may be one in 100,000."""
    ties = rows = 0
    for answer in answers:
        assert answer.routing is not None
        found = reference.forward(model, answer.tokens[:-1])
        differs = (np.sort(answer.routing.experts, axis=-1) != found.experts).any(axis=-1)
        assert not (differs & (found.margins > NEAR_TIE)).any(), np.argwhere(differs)[:3]
        ties, rows = ties + int(differs.sum()), rows + differs.size
    assert ties <= max(1, rows // 100_000), f"{ties} near-ties differ in {rows} rows"


def test_engine_describes_itself(sglang_worker: Worker, model_a: Path) -> None:
    spec: EngineSpec = sglang_worker("call", "spec")

    assert spec.model == ModelSpec.from_directory(model_a)
    assert spec.engine.startswith("sglang 0.5.")
    assert spec.capture
    assert spec.dtype == "float32"


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_and_experts_are_those_of_the_sampled_distribution(
    sglang_worker: Worker, model_a: Path, temperature: float
) -> None:
    prompts = [prompt for prompt in requests(24, seed=1) for _ in range(2)]
    answers = generate(sglang_worker, prompts, temperature)

    for request, answer in zip(prompts, answers, strict=True):
        np.testing.assert_array_equal(answer.tokens[: answer.prompt_len], request.tokens)
        assert answer.routing.rows == len(answer.tokens) - 1
        answer.routing.verify(answer.tokens)
        found = reference.forward(model_a, answer.tokens)
        expected = reference.logprobs(found, answer.tokens, answer.prompt_len, temperature)
        np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4, rtol=0)
    assert_same_experts(model_a, answers)


def test_the_checkpoints_own_sampling_defaults_do_not_reach_the_rollout(sglang_worker: Worker) -> None:
    # generation_config.json asks for top_k=2 at temperature 0.6.
    answers = generate(sglang_worker, requests(1, seed=2) * 64)

    assert len({int(answer.tokens[answer.prompt_len]) for answer in answers}) > 10


def test_equal_seeds_give_equal_answers_whatever_was_sampled_between(sglang_worker: Worker) -> None:
    prompts = requests(8, seed=4) * 8

    def answers(seed: int) -> list[Generation]:
        sglang_worker("engine", "flush_cache")
        return generate(sglang_worker, prompts, seed=seed)

    first, _, again, other = answers(5), generate(sglang_worker, prompts[:3]), answers(5), answers(6)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
        assert a.routing is not None
        assert b.routing is not None
        np.testing.assert_array_equal(a.routing.experts, b.routing.experts)
    assert any(not np.array_equal(a.tokens, b.tokens) for a, b in zip(first, other, strict=True))


def test_answers_end_with_their_stop_token_and_say_so(sglang_worker: Worker) -> None:
    answers = generate(sglang_worker, requests(1, seed=3) * 256)

    stopped = [answer for answer in answers if answer.finish == "stop"]
    assert stopped, "256 answers of 12 tokens over a vocabulary of 320 without one stop token"
    for answer in answers:
        response = answer.tokens[answer.prompt_len :].tolist()
        assert len(answer.logprobs) == len(response)
        assert EOS not in response[:-1]
        assert (response[-1] == EOS) == (answer.finish == "stop")
        assert answer.finish == "stop" or len(response) == 12


@pytest.mark.parametrize("slots_at_once", [65_536, 64, 1], ids=["one call", "some calls", "one call per sequence"])
def test_batched_decode_attention_is_that_of_the_loop(sglang_worker: Worker, slots_at_once: int) -> None:
    assert sglang_worker("decode_error", [1, 2, 31, 7, 16, 1, 30], slots_at_once) < 1e-5


def test_cached_prompts_return_the_same_experts(sglang_worker: Worker, model_a: Path) -> None:
    prompts = [request for request in requests(16, seed=4) if len(request.tokens) > 2]
    sglang_worker("engine", "flush_cache")
    cold = generate(sglang_worker, prompts)
    warm = generate(sglang_worker, prompts)

    assert sum(answer.cached_tokens for answer in cold) == 0
    assert [answer.cached_tokens for answer in warm] == [len(request.tokens) - 1 for request in prompts]
    assert_same_experts(model_a, warm)


def test_a_second_turn_carries_the_rows_of_the_first(sglang_worker: Worker, model_a: Path) -> None:
    first = generate(sglang_worker, requests(8, seed=5))
    second = generate(sglang_worker, [Request(np.append(a.tokens, np.int32(9)).astype(np.int32)) for a in first])

    assert sum(answer.cached_tokens for answer in second) > sum(len(answer.tokens) for answer in first) // 2
    assert_same_experts(model_a, second)


def test_turns_that_ask_for_later_rows_are_one_record(sglang_worker: Worker, model_a: Path) -> None:
    first = generate(sglang_worker, requests(6, seed=9))
    prompts = [
        # One of them wants all rows: SGLang takes one start for a batch.
        Request(np.append(a.tokens, [9, 8]).astype(np.int32), routing_start=next_start(a.routing) if i else 0)
        for i, a in enumerate(first)
    ]
    for batch in (prompts, prompts[1:]):
        second = generate(sglang_worker, batch)
        for request, after in zip(batch, second, strict=True):
            assert check_generation(request, after, sglang_worker("call", "spec"), capture=True) is None
            assert after.wire.begin == min(other.routing_start for other in batch)
        merged = [
            replace(b, routing=merge_turns(a.routing, b.routing, b.tokens))
            for a, b in zip(first[-len(batch) :], second, strict=True)
        ]
        assert_same_experts(model_a, merged)


def test_only_requests_that_ask_carry_routing(sglang_worker: Worker) -> None:
    options: dict[str, Any] = {"input_ids": [[5, 6, 7]], "sampling_params": {"max_new_tokens": 2}}

    # Rows come with the answer, or a ticket for those that lie in shared memory does.
    ways = {"routed_experts", TICKET_KEY}
    assert not ways & sglang_worker("raw", **options)[0]["meta_info"].keys()
    assert ways & sglang_worker("raw", **options, return_routed_experts=True)[0]["meta_info"].keys()
    (answer,) = sglang_worker("engine", "generate", requests(1, seed=6), Sampling(1.0, 2), capture=False)
    assert answer.routing is None
    assert answer.defect is None


def test_a_prompt_that_does_not_fit_is_refused_with_the_engines_words(sglang_worker: Worker) -> None:
    import ray

    endless = Request(np.full(5000, 7, dtype=np.int32))
    with pytest.raises(
        ray.exceptions.RayTaskError, match=r"EngineError.*sglang 0\.5\.\d+ refused 1 requests: .*longer"
    ):
        generate(sglang_worker, [endless])
    assert len(generate(sglang_worker, requests(2, seed=7))) == 2  # and the engine goes on


def test_worker_generates_evaluates_and_proves_its_capture(sglang_worker: Worker) -> None:
    prompts = tuple(Prompt(i, f"prompt number {i}", "") for i in range(8))
    report, batch = sglang_worker("call", "generate", prompts, 0, 4)
    canary, audited = sglang_worker("call", "canary", prompts)

    assert [(f.group, f.member) for f in report.facts] == [(g, m) for g in range(8) for m in range(4)]
    assert batch.facts() == report.facts
    assert report.dropped == ()
    for trajectory in batch.trajectories():
        trajectory.routing.verify(trajectory.tokens)
    assert len(sglang_worker("call", "evaluate", prompts).rewards) == 8
    assert (canary.equal_tokens, canary.equal_rows) == (1.0, 1.0)
    assert canary.cached_tokens > 0
    assert len(audited) == 8


def scheduler_processes() -> list[Any]:
    """SGLang's scheduler processes that belong to actors of this test session."""
    import psutil

    return [
        process
        for process in psutil.Process().children(recursive=True)
        if process.name().startswith("sglang::sch") or "sglang::scheduler" in " ".join(process.cmdline())
    ]


def buckets(directory: Path, version: int, tensors_per_bucket: int) -> WeightBuckets:
    """All tensors of a checkpoint, as the trainer sends them."""
    import torch
    from safetensors.torch import load_file

    tensors = list(load_file(directory / "model.safetensors").items())
    found = []
    for begin in range(0, len(tensors), tensors_per_bucket):
        slots, parts, offset = [], [], 0
        for name, tensor in tensors[begin : begin + tensors_per_bucket]:
            flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            slots.append(
                TensorSlot(
                    name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset, offset + len(flat)
                )
            )
            parts.append(flat)
            offset += len(flat)
        found.append(WeightBucket(tuple(slots), np.concatenate(parts)))
    return WeightBuckets(version, tuple(found))


def test_new_weights_are_used_stamped_and_leave_no_cache(sglang_worker: Worker, model_a: Path, model_b: Path) -> None:
    import ray

    prompts = requests(4, seed=8)
    expected = {m: [reference.greedy(m, request.tokens, 12) for request in prompts] for m in (model_a, model_b)}
    assert expected[model_a] != expected[model_b]

    def answers() -> tuple[list[Generation], list[list[int]]]:
        found = generate(sglang_worker, prompts, greedy=True, ignore_eos=True)
        return found, [answer.tokens[answer.prompt_len :].tolist() for answer in found]

    assert answers()[1] == expected[model_a]
    # A reference: the worker then sees read-only views of the object store, as it does in a run.
    assert sglang_worker("call", "load_weights", ray.put(buckets(model_b, 5, tensors_per_bucket=50))) > 0
    found, tokens = answers()
    assert tokens == expected[model_b]
    assert {answer.weight_version for answer in found} == {5}
    assert {span.weight_version for answer in found for span in answer.routing.spans} == {5}
    assert [answer.cached_tokens for answer in found] == [0] * len(prompts), "prefixes of the old weights were kept"
    assert_same_experts(model_b, found)

    sglang_worker("engine", "load_weights", model_a, 6)
    found, tokens = answers()
    assert tokens == expected[model_a]
    assert {answer.weight_version for answer in found} == {6}
    assert [answer.cached_tokens for answer in found] == [0] * len(prompts)


def test_another_models_checkpoint_is_not_loaded(sglang_worker: Worker, model_a: Path, tmp_path: Path) -> None:
    import ray

    from tests.tiny_model import write_files

    with pytest.raises(ray.exceptions.RayTaskError, match=r"ConfigError.*num_experts"):
        sglang_worker("engine", "load_weights", write_files(tmp_path / "other", num_experts=32), 7)
    sglang_worker("engine", "load_weights", model_a, 8)


@pytest.mark.slow
def test_a_killed_scheduler_takes_its_worker_down_and_the_pool_replaces_both(
    ray_session: None, model_a: Path, model_b: Path
) -> None:
    import ray

    from r3.rollout.pool import RolloutPool

    events: list[str] = []
    config = engine_config(prompts_per_step=4, start_timeout_s=300)
    prompts = tuple(Prompt(i, f"prompt number {i}", "") for i in range(4))
    others = {process.pid for process in scheduler_processes()}
    with RolloutPool(config, model_a, lambda kind, **facts: events.append(kind)) as pool:
        pool.load_weights(ray.put(buckets(model_b, 3, tensors_per_bucket=50)))
        (scheduler,) = [process for process in scheduler_processes() if process.pid not in others]
        scheduler.kill()
        rollout = pool.generate(prompts, 1)

    assert events == ["rollout_worker_died", "rollout_worker_replaced"]
    assert {fact.weight_version for fact in rollout.facts} == {3}
    assert len(rollout.facts) == 4 * config.grpo.group_size
