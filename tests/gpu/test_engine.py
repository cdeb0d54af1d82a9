"""The engine on a GPU, with CUDA graphs, overlap scheduling and a prefix cache: rows are those of its forward passes.

Every test runs on a share of one GPU and, where there are two, on a tensor parallel engine over both. The reference is
a Hugging Face forward in float32, the engine computes in bfloat16: near a tie they may choose otherwise
(`tests/engines/test_agreement.py` shows what the condition accepts and finds, on a CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3.config import Config
from r3.rollout.engine import Generation, Request, Sampling
from tests.engines import reference, scenarios
from tests.engines.agreement import Agreement, agreement
from tests.megatron.toys import SIZES_FOR_KERNELS, write_model
from tests.real_engine import StampingHost, engine_config, running
from tests.tiny_model import EOS, VOCAB_SIZE

pytestmark = pytest.mark.gpu

Worker = Callable[..., Any]


@pytest.fixture(scope="module", params=[0.5, 2], ids=["one GPU", "two GPUs"])
def gpus(request: pytest.FixtureRequest) -> float:
    import torch

    if request.param > torch.cuda.device_count():
        pytest.skip(f"needs {request.param} GPUs")
    return request.param


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, gpus: float) -> Path:
    """A random checkpoint with the key-value rows of `SIZES_FOR_KERNELS` on every rank."""
    heads = {"num_key_value_heads": 2 * max(1, int(gpus))}
    return write_model(tmp_path_factory.mktemp("models") / "small", **SIZES_FOR_KERNELS, **heads)


@pytest.fixture(scope="module")
def engine(model: Path, gpus: float) -> Iterator[Worker]:
    """An engine in a Ray actor as in a run, with little KV and small chunks."""
    import ray
    import torch

    ray.init(address="local", num_gpus=torch.cuda.device_count(), include_dashboard=False, log_to_driver=False)
    with running(StampingHost, gpu_config(gpus), model, gpus) as call:
        yield call
    ray.shutdown()


def gpu_config(gpus: float) -> Config:
    arguments = {"attention_backend": "triton", "sampling_backend": "pytorch", "grammar_backend": "none",
                 "chunked_prefill_size": 64, "schedule_conservativeness": 0.01}  # fmt: skip
    if gpus > 1:
        # NCCL alone: kernels of other libraries for this need not be installed.
        arguments |= {"disable_custom_all_reduce": True, "enforce_disable_flashinfer_allreduce_fusion": True}
    return engine_config(
        dtype="bfloat16", gpus_per_worker=gpus, mem_fraction=0.3, max_total_tokens=4096, engine_args=arguments
    )


def requests(count: int, seed: int, longest: int = 150) -> list[Request]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, count)
    return [Request(generator.integers(2, VOCAB_SIZE, int(length)).astype(np.int32)) for length in lengths]


def assert_rows(model: Path, answers: list[Generation]) -> None:
    total = Agreement()
    for answer in answers:
        assert answer.defect is None
        assert answer.routing is not None
        assert answer.routing.rows == len(answer.tokens) - 1
        answer.routing.verify(answer.tokens)
        experts = answer.routing.experts
        found = reference.forward(model, answer.tokens[:-1], forced=experts)
        total += agreement(experts, found.experts, found.margins)
    print(total)
    total.require()


def test_mixed_lengths_cold_and_from_the_cache(engine: Worker, model: Path) -> None:
    prompts = requests(64, seed=1)
    sampling = Sampling(1.0, 24, ignore_eos=True)
    cold, warm = (engine("engine", "generate", prompts, sampling, capture=True) for _ in range(2))
    assert sum(answer.cached_tokens for answer in warm) > 1000
    assert_rows(model, [*cold, *warm])


def test_retraction_under_kv_pressure(engine: Worker, model: Path) -> None:
    answers = engine(
        # SGLang believes that answers end early, as it does not of requests that ignore their end.
        "engine",
        "generate",
        requests(64, seed=5, longest=20),
        Sampling(1.0, 120, (EOS,)),
        capture=True,
    )
    assert_rows(model, [answer for answer in answers if not answer.stale])


def test_an_aborted_request_brings_the_rows_that_it_ran(engine: Worker, model: Path) -> None:
    answer = engine("play", scenarios.aborted, requests(1, seed=6)[0].tokens, model, 1)
    assert answer.finish == "abort"
    assert_rows(model, [answer])
