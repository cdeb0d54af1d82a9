"""The condition on an engine's rows in bfloat16, without an engine: what it accepts, and what it must find.

A bfloat16 forward of Hugging Face stands where the engine does; the reference is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.engines import reference
from tests.engines.agreement import Agreement, agreement
from tests.tiny_model import VOCAB_SIZE

pytest.importorskip("transformers")
pytest.importorskip("megatron.core")

Answers = list[tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.megatron.toys import SIZES_FOR_KERNELS, write_model

    return write_model(tmp_path_factory.mktemp("model"), **SIZES_FOR_KERNELS)


@pytest.fixture(scope="module")
def answers(model: Path) -> Answers:
    """Tokens `[S]` of random requests, and the experts `[S, layers, k]` that bfloat16 chooses."""
    import torch
    from transformers import AutoModelForCausalLM

    engine = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    generator, found = np.random.default_rng(1), []
    for length in generator.integers(61, 175, 10):
        tokens = generator.integers(2, VOCAB_SIZE, int(length))
        with torch.no_grad():
            logits = engine(torch.from_numpy(tokens)[None], output_router_logits=True).router_logits
        chosen = torch.stack([layer.topk(engine.config.num_experts_per_tok).indices for layer in logits], dim=1)
        found.append((tokens, chosen.numpy()))
    return found


def compare(model: Path, answers: Answers) -> Agreement:
    total = Agreement()
    for tokens, experts in answers:
        found = reference.forward(model, tokens, forced=experts)
        total += agreement(experts, found.experts, found.margins)
    return total


def test_another_dtype_passes_however_few_rows_there_are(model: Path, answers: Answers) -> None:
    compare(model, answers).require()
    for tokens, experts in answers[:6]:
        compare(model, [(tokens[:30], experts[:30])]).require()


def test_a_reference_on_its_own_way_is_further_off(model: Path, answers: Answers) -> None:
    """Why it is forced: else experts chosen otherwise in earlier layers and at earlier tokens add up."""
    alone = Agreement()
    for tokens, experts in answers:
        found = reference.forward(model, tokens)
        alone += agreement(experts, found.experts, found.margins)
    together = compare(model, answers)
    assert alone.rows - alone.same > 1.3 * (together.rows - together.same)


def shifted(experts: np.ndarray) -> np.ndarray:
    return np.roll(experts, 1, axis=0)


def last_layers_swapped(experts: np.ndarray) -> np.ndarray:
    return experts[:, [0, 1, 3, 2]]


def late(experts: np.ndarray) -> np.ndarray:
    """The second half one token late, as behind a cached prefix of the wrong length."""
    half = len(experts) // 2
    return np.concatenate([experts[:half], shifted(experts[half:])])


def one_in_forty(experts: np.ndarray) -> np.ndarray:
    wrong = experts.copy()
    wrong[20::40] = experts[19:-1:40]
    return wrong


@pytest.mark.parametrize(
    ("change", "share"), [(shifted, 0.9), (last_layers_swapped, 0.4), (late, 0.4), (one_in_forty, 0.01)]
)
def test_misaligned_rows_fail_by_far(
    change: Callable[[np.ndarray], np.ndarray], share: float, model: Path, answers: Answers
) -> None:
    found = compare(model, [(tokens, change(experts)) for tokens, experts in answers])
    assert found.wrong > share * found.clear
    with pytest.raises(AssertionError, match=r"rows (agree|differ)"):
        found.require()


@pytest.mark.parametrize("change", [shifted, last_layers_swapped, late])
def test_misaligned_rows_of_a_single_short_request_fail(
    change: Callable[[np.ndarray], np.ndarray], model: Path, answers: Answers
) -> None:
    for tokens, experts in answers[:3]:
        with pytest.raises(AssertionError, match=r"rows agree"):
            compare(model, [(tokens[:30], change(experts[:30]))]).require()
