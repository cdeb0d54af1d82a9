"""Packed sequences: the plan of padded batches, attention and rotary embeddings against one sequence at a time."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from r3.errors import ConfigError
from r3.trainer import modules, rope
from r3.trainer.modules import RMSNorm, SdpaAttention
from r3.trainer.packing import PADDING_LIMIT, Packing, plan_batches

pytestmark = pytest.mark.megatron

CPU = torch.device("cpu")
UTILS = "megatron.core.models.common.embeddings.rope_utils"
MIXED = [3, 200, 7, 1, 64, 65, 2, 199, 30]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_every_row_is_read_back_from_its_own_place(lengths: list[int]) -> None:
    batches, back = plan_batches(lengths)
    rows = np.concatenate([batch.reshape(-1) for batch in batches])
    assert (rows[back] == np.arange(sum(lengths))).all()
    assert len(rows) <= PADDING_LIMIT * sum(lengths) + max(lengths)
    assert len(batches) <= 2 + np.log2(max(lengths) / min(lengths))
    ends = np.cumsum(lengths)
    for batch in batches:
        sequence = np.searchsorted(ends, batch, side="right")
        assert (sequence == sequence[0]).all(), "a column of a batch holds rows of two sequences"
        assert (np.diff(batch, axis=0) >= 0).all()


def attention(groups: int) -> Any:
    module = object.__new__(SdpaAttention)
    torch.nn.Module.__init__(module)
    module.scale = 0.25
    module.context_group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    return module


@pytest.mark.parametrize("lengths", [MIXED, [5], [40, 41, 42], [1] * 9])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_and_its_gradients_are_those_of_one_sequence_at_a_time(lengths: list[int], groups: int) -> None:
    torch.manual_seed(0)
    rows = sum(lengths)
    parts = [torch.randn(rows, heads, 16, dtype=torch.float64, requires_grad=True) for heads in (4, groups, groups)]
    found = attention(groups)(*parts, packed_seq_params=Packing.of(lengths, CPU))

    def alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
        return mixed[0].transpose(0, 1).flatten(1)

    expected = torch.cat([alone(*cut) for cut in zip(*(part.split(lengths) for part in parts), strict=True)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, parts, weights), torch.autograd.grad(expected, parts, weights), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def stock() -> Any:
    """A module of its own, in which Megatron's function still stands."""
    spec = importlib.util.find_spec(UTILS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def context(rank: int, size: int) -> Any:
    return SimpleNamespace(size=lambda: size, rank=lambda: rank)


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2), (2, 4)])
@pytest.mark.parametrize("lengths", [[8, 24, 16], [16], [8] * 5])
def test_rotary_embeddings_are_megatrons_to_the_bit(stock: Any, rank: int, size: int, lengths: list[int]) -> None:
    group = context(rank, size)
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    torch.manual_seed(1)
    t = torch.randn(sum(lengths) // size, 3, 16, requires_grad=True)
    freqs = torch.randn(max(lengths), 1, 1, 16)
    expected = stock._apply_rotary_pos_emb_thd(t, bounds, freqs, rotary_interleaved=False, cp_group=group)
    found = rope.rotate_packed(t, bounds, freqs, rotary_interleaved=False, cp_group=group)
    assert torch.equal(found, expected)
    weights = torch.randn_like(t)
    assert torch.equal(*(torch.autograd.grad(one, t, weights)[0] for one in (found, expected)))
    assert importlib.import_module(UTILS)._apply_rotary_pos_emb_thd is rope.rotate_packed


def test_angles_are_made_once_for_a_microbatch_and_anew_for_whatever_differs(
    stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.Size] = []
    turn = rope._turn
    monkeypatch.setattr(rope, "_turn", lambda t, *args: (made.append(t.shape), turn(t, *args))[1])
    torch.manual_seed(2)
    freqs, others = torch.randn(2, 5, 1, 1, 8)
    bounds = torch.tensor([0, 5, 8], dtype=torch.int32)

    def rotate(heads: int, freqs: torch.Tensor, bounds: torch.Tensor, **kinds: Any) -> int:
        """Rotate as Megatron-core does, or fail; return how many times angles were made for it."""
        t = torch.randn(int(bounds[-1]), heads, 8).to(kinds.pop("dtype", torch.float32))
        before = len(made)
        found = rope.rotate_packed(t, bounds, freqs, cp_group=context(0, 1), **kinds)
        assert torch.equal(found, stock._apply_rotary_pos_emb_thd(t, bounds, freqs, cp_group=context(0, 1), **kinds))
        return len(made) - before

    # Queries, keys, and another tensor over the same angles, as recomputation hands it on.
    assert [rotate(4, freqs, bounds), rotate(2, freqs, bounds), rotate(4, freqs.detach(), bounds)] == [1, 0, 0]
    assert rotate(4, others, bounds) == 1
    assert rotate(4, others, bounds, mscale=2.0) == 1
    assert rotate(4, others, bounds, mscale=2.0, dtype=torch.bfloat16) == 1
    # Other microbatches, whose bounds may lie where those of one before lay.
    for lengths in ([3, 5], [5, 3], [2, 2, 4]):
        assert rotate(4, others, torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)) == 1


def test_a_kind_of_rotation_that_no_model_has_is_refused() -> None:
    t, freqs, bounds = torch.zeros(4, 1, 8), torch.zeros(4, 1, 1, 8), torch.tensor([0, 4], dtype=torch.int32)
    for kinds in ({"rotary_interleaved": True}, {"mla_rotary_interleaved": True}):
        with pytest.raises(ConfigError, match=next(iter(kinds))):
            rope.rotate_packed(t, bounds, freqs, cp_group=context(0, 1), **kinds)
    with pytest.raises(ConfigError, match=r"whole heads \(8\), not 4 wide"):
        rope.rotate_packed(t, bounds, freqs[..., :4], cp_group=context(0, 1))


@pytest.mark.parametrize("rounds_once", [modules._ROUNDS_ONCE, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_computed_in_fp32_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rounds_once: bool
) -> None:
    monkeypatch.setattr(modules, "_ROUNDS_ONCE", rounds_once)
    torch.manual_seed(3)
    norm = RMSNorm(SimpleNamespace(params_dtype=dtype, sequence_parallel=False), 24)
    with torch.no_grad():
        norm.weight.copy_(1 + torch.randn(24) / 4)
    hidden = (3 * torch.randn(7, 2, 24)).to(dtype).requires_grad_()
    wide = hidden.float()
    exact = wide * (wide.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight.float()
    found, weights = norm(hidden), torch.randn(7, 2, 24).to(dtype)
    assert found.dtype == dtype
    assert torch.equal(found, exact.to(dtype))
    ours, theirs = (torch.autograd.grad(one, [hidden, norm.weight], weights) for one in (found, exact.to(dtype)))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
