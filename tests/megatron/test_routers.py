"""Statistics and refusals of the replay router: pads, expert bias, auxiliary loss, other checkpoint functions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from r3.errors import ConfigError
from r3.trainer import build
from r3.trainer.architecture import Architecture, require_layout
from r3.trainer.batching import Form, microbatch
from r3.trainer.model import transformer_config
from r3.trainer.policy import Policy, RoutingUse
from r3.trainer.replay import ReplayRouter, router_order
from tests.megatron.test_replay import accumulate, assert_same, make_policy
from tests.megatron.toys import make_batch, make_config, prepare

pytestmark = [pytest.mark.megatron, pytest.mark.usefixtures("single_rank")]
FORCED = RoutingUse(force=True)
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
ROUTERS: dict[str, dict[str, Any]] = {
    "sigmoid, expert bias, groups, scaling (DeepSeek-V3, GLM-4-MoE)": SIGMOID
    | {
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_shared_expert_intermediate_size": 32,
    },
    "softmax before top-k": {"moe_router_pre_softmax": True},
    "auxiliary loss and z-loss": {
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.1,
        "moe_z_loss_coeff": 1e-2,
    },
}


def policy_with(
    directory: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], recompute: str = "none"
) -> Policy:
    """A policy whose routers are of another kind; parameters that the checkpoint lacks are drawn at random."""
    plain = build.transformer_config
    monkeypatch.setattr(build, "transformer_config", lambda *a, **k: plain(*a, **(k | changes)))

    def load(chunks: Any, *_: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        for chunk in chunks:
            for name, parameter in sorted(chunk.named_parameters()):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(1 + 0.2 * noise if "norm" in name else 0.08 * noise)

    monkeypatch.setattr(build, "load_weights", load)
    return make_policy(directory, make_config(trainer={"recompute": recompute}))


def routers(policy: Policy) -> list[ReplayRouter]:
    return [module for module in policy.chunks[0].modules() if isinstance(module, ReplayRouter)]


@pytest.mark.parametrize("changes", ROUTERS.values(), ids=ROUTERS)
def test_other_routers_replay_every_id_also_when_recomputed(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    found = []
    for recompute in ("none", "full", "selective"):
        policy = policy_with(model_dir, monkeypatch, changes, recompute)
        step, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
        counts = policy.logprobs(microbatches, step, FORCED).counts
        assert counts.mismatched_ids == 0
        assert counts.replayed == counts.required
        found.append(accumulate(policy, step, microbatches, FORCED))
    for other in found[1:]:
        assert_same(found[0][1], other[1])


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_expert_bias_counts_replayed_ids_once_and_never_pads(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, recompute: str
) -> None:
    policy = policy_with(model_dir, monkeypatch, SIGMOID, recompute)
    step, (whole,) = prepare(policy, make_batch(policy.arch.spec), 12)
    # Every row that is no pad has a record, so that the statistic is known without a forward pass.
    full = replace(whole, recorded=~whole.pads)
    ids = np.argsort(np.random.default_rng(0).random((*whole.pads.shape, 4, 16)), -1)[..., :4]
    full = replace(full, experts=ids.astype(np.uint8))
    assert full.pads.any()
    monkeypatch.setattr(policy._layout, "finalize_model_grads_func", lambda *_, **__: None)
    policy.logprobs([full], step, FORCED)
    assert all(not router.local_tokens_per_expert.any() for router in routers(policy)), "no statistic without gradient"
    accumulate(policy, step, [full], FORCED)
    for layer, router in enumerate(routers(policy)):
        expected = np.bincount(ids[:, :, layer][~full.pads].reshape(-1), minlength=16)
        np.testing.assert_array_equal(router.local_tokens_per_expert.numpy(), expected)


def test_the_auxiliary_loss_uses_the_own_top_k(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The balancing gradient of a router does not depend on what was replayed through it."""
    policy = policy_with(model_dir, monkeypatch, ROUTERS["auxiliary loss and z-loss"])
    _, microbatches = prepare(policy, make_batch(policy.arch.spec), 12)
    router = routers(policy)[0].train()
    one = microbatches[0]
    logits = torch.randn(*one.pads.T.shape, 16, generator=torch.Generator().manual_seed(0))
    slopes = []
    for ids in (one.experts, np.roll(one.experts, 1, axis=-1) ^ 1):
        from tests.megatron.test_replay import routing_of

        leaf = logits.clone().requires_grad_()
        routing = routing_of(replace(one, experts=ids))
        probs, _ = policy.replay.run(routing, lambda leaf=leaf: router.routing(leaf)[0]), None
        (probs * 0).sum().backward()
        slopes.append(leaf.grad)
    assert slopes[0].abs().max() > 0
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0, atol=0)
    pads = router_order(torch.from_numpy(one.pads))
    assert not slopes[0].reshape(len(pads), -1)[pads].any(), "pads carry no balancing gradient"


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_function_without_megatrons_flags(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, reentrant: bool
) -> None:
    policy = make_policy(model_dir)
    step, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
    expected = accumulate(policy, step, microbatches, FORCED)
    policy = make_policy(model_dir, make_config(trainer={"recompute": "full"}))

    def other(function: Any, _distribute: bool, *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=reentrant)

    from megatron.core import tensor_parallel

    monkeypatch.setattr(tensor_parallel, "checkpoint", other)
    found = accumulate(policy, step, microbatches, FORCED)
    assert_same(expected[1], found[1])


def test_more_than_256_experts(tmp_path: Path) -> None:
    from tests.megatron.toys import write_model

    small = {"num_experts": 300, "num_hidden_layers": 2, "moe_intermediate_size": 8}
    policy = make_policy(write_model(tmp_path / "wide", **small))
    step, microbatches = prepare(policy, make_batch(policy.arch.spec), 12)
    assert microbatches[0].experts.dtype == np.uint16
    assert microbatches[0].experts.max() > 255
    counts = policy.logprobs(microbatches, step, FORCED).counts
    assert (counts.mismatched_ids, counts.replayed) == (0, counts.required)


def test_packing_pads_only_what_the_layout_needs(model_dir: Path) -> None:
    policy = make_policy(model_dir)
    step, _ = prepare(policy, make_batch(policy.arch.spec), 12)
    samples = range(len(step.trajectories))
    spec = policy.arch.spec
    assert microbatch(step, samples, spec, Form(packed=True)).rows.pads == 0
    for form in (Form(True, sequence=(1, 4)), Form(True, context=(1, 2)), Form(True, (0, 4), (1, 2))):
        made = microbatch(step, samples, spec, form)
        assert made.rows.pads < len(samples) * form.sequence_unit + form.unit
        assert made.tokens.shape[1] * form.context[1] == made.shape[1]
        assert made.pads.shape[1] * form.sequence[1] == made.tokens.shape[1]


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        (
            {"processes": 2, "tensor_parallel": 2, "expert_tensor_parallel": 1},
            "would not reduce the experts' gradients",
        ),
        ({"processes": 3, "tensor_parallel": 2}, "not divisible by tensor_parallel"),
        ({"processes": 2, "expert_parallel": 4}, "not divisible by expert_tensor_parallel"),
        ({"virtual_pipeline": 2}, "needs pipeline_parallel > 1"),
    ],
)
def test_layouts_that_cannot_work_are_refused(trainer: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make_config(trainer=trainer)


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        (
            {"processes": 3, "pipeline_parallel": 3},
            "pipeline_parallel x virtual_pipeline=3 does not divide .* 4 layers",
        ),
        ({"processes": 2, "pipeline_parallel": 2, "virtual_pipeline": 4}, "=8 does not divide"),
        ({"processes": 4, "tensor_parallel": 4}, "tensor_parallel=4 does not divide the model's 2 key-value heads"),
        ({"processes": 3, "expert_parallel": 3}, "expert_parallel=3 does not divide the model's 16 experts"),
    ],
)
def test_models_that_cannot_be_cut_so_are_refused(model_dir: Path, trainer: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        require_layout(Architecture.from_directory(model_dir), make_config(trainer=trainer).trainer)


def test_the_config_has_one_place_for_every_recompute_kind(model_dir: Path) -> None:
    arch = Architecture.from_directory(model_dir)
    made = transformer_config(arch, dtype=torch.float32, recompute="selective")
    assert (made.recompute_granularity, made.recompute_modules) == ("selective", ["core_attn", "moe"])
