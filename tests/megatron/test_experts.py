"""Grouped experts are the sequential ones: loss, gradients, weights and checkpoints, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from r3.config import TrainerConfig
from r3.errors import ConfigError
from r3.trainer import experts, model
from r3.trainer.build import build_chunks, build_layout
from r3.trainer.convert import HfTensors, export_weights, find_rule, local_name
from r3.trainer.dispatch import LocalDispatcher
from r3.trainer.model import Architecture
from r3.trainer.outcome import Rehearsal, worst_difference
from r3.types import Batch, ModelSpec
from tests.gloo_pool import GlooPool
from tests.megatron.layouts import EP, ETP1, PP, TP, layout_config, run_layout
from tests.megatron.toys import make_batch, make_config, write_mixtral

pytestmark = pytest.mark.megatron

GROUPED = {"experts": "grouped"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2, selective recompute": TP | {"recompute": "selective"},
    "ep2, full recompute, distributed optimizer": EP | {"recompute": "full", "distributed_optimizer": True},
    "tp2+ep2": TP | EP | ETP1,
    "pp2": PP,
}


@pytest.fixture(scope="module")
def batch(model_dir: Path) -> Batch:
    return make_batch(ModelSpec.from_directory(model_dir))


@pytest.fixture(scope="module")
def sequential(model_dir: Path, batch: Batch) -> Rehearsal:
    with GlooPool(1) as alone:
        found: Rehearsal = alone.run(run_layout, layout_config({"experts": "sequential"}, 1), model_dir, batch)[0]
    return found


def assert_same(found: Rehearsal, expected: Rehearsal) -> None:
    assert found.counts.mismatched_ids == 0
    assert found.counts.replayed == expected.counts.replayed > 0
    assert found.loss == pytest.approx(expected.loss, abs=1e-6)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5, rtol=0)
    if not found.sharded:
        assert worst_difference(found.gradients, expected.gradients)[0] < 1e-5
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    off = [np.abs(found.weights[name] - tensor).reshape(-1) > 2e-5 for name, tensor in expected.weights.items()]
    assert np.concatenate(off).mean() <= 1e-3


def test_one_process(model_dir: Path, batch: Batch, sequential: Rehearsal) -> None:
    with GlooPool(1) as alone:
        found = alone.run(run_layout, layout_config(GROUPED, 1), model_dir, batch)[0]
    assert_same(found, sequential)
    assert any("experts.3.down_proj" in name and np.abs(g).max() > 0 for name, g in found.gradients.items())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(
    gloo_pool: GlooPool, model_dir: Path, batch: Batch, sequential: Rehearsal, layout: dict[str, Any]
) -> None:
    found = gloo_pool.run(run_layout, layout_config(GROUPED | layout, 2), model_dir, batch)[0]
    assert_same(found, sequential)


def test_bfloat16_rounds_as_the_sequential_experts_do(model_dir: Path, batch: Batch) -> None:
    with GlooPool(1) as alone:
        one, other = (
            alone.run(run_layout, layout_config({"experts": kind, "dtype": "bfloat16"}, 1), model_dir, batch)[0]
            for kind in ("sequential", "grouped")
        )
    assert one.loss == pytest.approx(other.loss, abs=1e-3)
    assert worst_difference(one.gradients, other.gradients)[0] < 0.05


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_a_checkpoint_goes_in_and_out_to_the_bit(model_dir: Path, tmp_path: Path, family: str) -> None:
    directory = model_dir if family == "qwen3_moe" else write_mixtral(tmp_path / "mixtral")
    config, arch = make_config(trainer=GROUPED), Architecture.from_directory(directory)
    chunks = build_chunks(config, arch, build_layout(config, arch), directory, replay=True)
    names = {name for name, _ in chunks[0].named_parameters()}
    assert "decoder.layers.0.mlp.experts.fc1" in names
    assert not [name for name in names if "local_experts" in name]
    exported = dict(export_weights(chunks, arch))
    with HfTensors(directory) as tensors:
        for name, tensor in exported.items():
            assert torch.equal(tensor, tensors.read(name)), name
    assert sum(".experts." in name for name in exported) == 3 * arch.spec.num_experts * len(arch.spec.moe_layers)


@pytest.mark.usefixtures("single_rank")
def test_a_rank_without_a_token_gives_every_weight_a_gradient_of_zero(model_dir: Path) -> None:
    config, arch = make_config(trainer=GROUPED), Architecture.from_directory(model_dir)
    (chunk,) = build_chunks(config, arch, build_layout(config, arch), model_dir, replay=True)
    module = chunk.decoder.layers[0].mlp.experts
    tokens = torch.empty(0, arch.spec.hidden_size, requires_grad=True)
    out, bias = module(tokens, torch.zeros(arch.spec.num_experts, dtype=torch.int64), torch.empty(0))
    out.sum().backward()
    assert bias is None
    assert out.shape == tokens.shape
    for weight in module.parameters():
        assert weight.grad is not None
        assert weight.grad.shape == weight.shape
        assert not weight.grad.any()


@pytest.mark.usefixtures("single_rank")
def test_tokens_of_one_rank_take_the_way_that_megatron_takes(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for local in (True, False):
        if not local:
            monkeypatch.setattr(model, "dispatch_locally", lambda model: None)
        config, arch = make_config(trainer=GROUPED), Architecture.from_directory(model_dir)
        (chunk,) = build_chunks(config, arch, build_layout(config, arch), model_dir, replay=True)
        layer = chunk.decoder.layers[0].mlp
        assert isinstance(layer.token_dispatcher, LocalDispatcher) == local
        hidden = torch.randn(7, 3, arch.spec.hidden_size, generator=torch.Generator().manual_seed(0))
        hidden.requires_grad_()
        out, _ = layer(hidden)
        out.square().sum().backward()
        found.append([out, hidden.grad, layer.router.weight.grad, *(one.grad for one in layer.experts.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("single_rank")
def test_the_way_of_one_rank_asks_the_device_for_nothing(model_dir: Path) -> None:
    config, arch = make_config(trainer=GROUPED), Architecture.from_directory(model_dir)
    (chunk,) = build_chunks(config, arch, build_layout(config, arch), model_dir, replay=True)
    dispatcher = chunk.decoder.layers[0].mlp.token_dispatcher
    # A fake tensor has no values: what a host would have to wait for is an error.
    with FakeTensorMode():
        tokens = torch.randn(7, 3, arch.spec.hidden_size, requires_grad=True)
        probs = torch.rand(21, arch.spec.num_experts, requires_grad=True)
        sent, gates = dispatcher.dispatch_preprocess(tokens, torch.ones_like(probs, dtype=torch.bool), probs)
        sent, _, gates = dispatcher.dispatch_postprocess(*dispatcher.token_dispatch(sent, gates))
        back = dispatcher.combine_preprocess(sent * gates[:, None])
        out = dispatcher.combine_postprocess(dispatcher.token_combine(back))
        out.sum().backward()
    assert len(sent) == 21 * arch.spec.top_k
    for one in (tokens, probs):
        assert one.grad is not None
    assert tokens.shape == out.shape


@pytest.mark.usefixtures("single_rank")
def test_a_token_that_names_an_expert_twice_takes_a_place_behind_all_experts(model_dir: Path) -> None:
    config, arch = make_config(trainer=GROUPED), Architecture.from_directory(model_dir)
    (chunk,) = build_chunks(config, arch, build_layout(config, arch), model_dir, replay=True)
    dispatcher, k = chunk.decoder.layers[0].mlp.token_dispatcher, arch.spec.top_k
    ids = torch.stack([torch.arange(row, row + k) for row in range(5)])
    ids[3] = ids[3, 0]
    routing_map = torch.zeros(5, arch.spec.num_experts, dtype=torch.bool).scatter_(1, ids, True)
    probs = torch.rand(5, arch.spec.num_experts)
    tokens = torch.arange(5.0)[:, None]
    found, gates = dispatcher.dispatch_preprocess(tokens, routing_map, probs)
    experts, chosen = routing_map.T.nonzero(as_tuple=True)
    assert len(found) == 5 * k > len(chosen)
    assert found[: len(chosen), 0].tolist() == chosen.tolist()
    assert torch.equal(gates[: len(chosen)], probs[chosen, experts])
    assert dispatcher.tokens_per_expert.tolist() == routing_map.sum(0).tolist()
    assert not found[len(chosen) :].any()


def test_who_is_grouped(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arch = Architecture.from_directory(model_dir)

    def grouped(**keys: Any) -> bool:
        return experts.uses_grouped(arch, TrainerConfig(**keys))

    assert not grouped()
    assert grouped(experts="grouped")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert not grouped(dtype="bfloat16")
    with pytest.raises(ConfigError, match="right on Hopper GPUs"):
        grouped(dtype="bfloat16", experts="grouped")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert grouped(dtype="bfloat16")
    assert not grouped(dtype="bfloat16", experts="sequential")
    assert not grouped(dtype="float32")
    odd = dict(dtype="bfloat16", tensor_parallel=8, processes=8)
    assert not grouped(**odd)
    with pytest.raises(ConfigError, match="8 divides, this rank's are 64 and 4"):
        grouped(experts="grouped", **odd)
    monkeypatch.delattr(F, "grouped_mm")
    with pytest.raises(ConfigError, match="no grouped_mm"):
        grouped(experts="grouped")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp.experts.linear_fc1.weight17", "mlp.experts.local_experts.17.linear_fc1.weight"),
        ("mlp.experts.linear_fc2.weight0", "mlp.experts.local_experts.0.linear_fc2.weight"),
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
        ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.weight"),
        ("mlp.linear_fc1.weight", "mlp.linear_fc1.weight"),
    ],
)
def test_transformer_engine_names_have_a_rule(name: str, expected: str) -> None:
    found = local_name(f"decoder.layers.3.{name}")
    assert found == f"decoder.layers.3.{expected}"
    find_rule(found, "qwen3_moe")


def test_transformer_engine_is_refused_where_it_is_absent(model_dir: Path) -> None:
    config, arch = make_config(trainer={"transformer_engine": True}), Architecture.from_directory(model_dir)
    with pytest.raises(ConfigError, match=r"no transformer_engine.*r3\.doctor replay.*transformer_engine: false"):
        build_layout(config, arch)
