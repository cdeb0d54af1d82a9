"""Statistics and refusals of the replay router: pads, expert bias, auxiliary loss, other checkpoint functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from r3.errors import ConfigError
from r3.trainer import build, model
from r3.trainer.architecture import Architecture, require_layout
from r3.trainer.batching import Form, microbatch
from r3.trainer.megatron import GPTModel, TransformerBlockSubmodules, TransformerConfig
from r3.trainer.model import layer_spec, transformer_config
from r3.trainer.modules import RMSNorm
from r3.trainer.policy import Policy, RoutingUse
from r3.trainer.replay import MicrobatchRouting, ReplayContext, ReplayRouter, router_order
from tests.megatron.test_replay import accumulate, assert_agree, assert_same, make_policy, routing_of
from tests.megatron.toys import make_batch, make_config, prepare, write_mixtral, write_model

pytestmark = [pytest.mark.megatron, pytest.mark.usefixtures("single_rank")]
FORCED = RoutingUse(force=True)
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
DENSE_FIRST = {"mlp_only_layers": [0]}


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of router: changes of the checkpoint and of Megatron's configuration, and the gate weights it gives.

    `weights(logits, ids)`: the weights `[tokens, k]` of the experts `ids`, whoever chose them.
    """

    weights: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    router: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    write: Callable[..., Path] = write_model
    biased: bool = False


class BiasedRouter(ReplayRouter):
    """A router with the bias that `add_bias_linear` gives it; with that key, Megatron-core's local experts get biases
    too, whose backward fails (0.16.1 adds them in place to a view)."""

    def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
        biased = copy(config)
        biased.add_bias_linear = True
        super().__init__(biased, **kwargs)


def softmax_of_chosen(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logits.gather(1, ids).softmax(1)


def sigmoid_of_chosen(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    scores = logits.sigmoid().gather(1, ids)
    return scores / scores.sum(1, keepdim=True)


KINDS = {
    "Qwen3-MoE": Kind(softmax_of_chosen),
    "Mixtral, top-2": Kind(softmax_of_chosen, write=write_mixtral),
    "Mixtral, softmax over all experts": Kind(
        lambda logits, ids: logits.softmax(1).gather(1, ids), {"moe_router_pre_softmax": True}, write=write_mixtral
    ),
    "DeepSeek-V3: sigmoid, expert bias, groups, scaling, shared expert, dense first layers": Kind(
        lambda logits, ids: 2.5 * sigmoid_of_chosen(logits, ids),
        SIGMOID
        | {
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 2,
            "moe_router_topk_scaling_factor": 2.5,
            "moe_shared_expert_intermediate_size": 32,
        },
        {"mlp_only_layers": [0, 1]},
    ),
    "GLM-4-MoE: sigmoid, expert bias, shared expert, dense first layer": Kind(
        sigmoid_of_chosen, SIGMOID | {"moe_shared_expert_intermediate_size": 32}, DENSE_FIRST
    ),
    "GPT-OSS: router bias, top-k then softmax": Kind(softmax_of_chosen, biased=True),
    "auxiliary loss and z-loss": Kind(
        softmax_of_chosen,
        {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 1e-2},
    ),
}
AUXILIARY = KINDS["auxiliary loss and z-loss"].router


def policy_of(kind: Kind, directory: Path, monkeypatch: pytest.MonkeyPatch, recompute: str = "none") -> Policy:
    """A policy with routers of a kind."""
    with monkeypatch.context() as patch:
        if kind.biased:
            patch.setattr(model, "ReplayRouter", BiasedRouter)
        return policy_with(directory, monkeypatch, kind.router, recompute)


def policy_with(
    directory: Path, monkeypatch: pytest.MonkeyPatch, changes: Mapping[str, Any], recompute: str = "none"
) -> Policy:
    """A policy whose routers are of another kind; parameters that the checkpoint lacks are drawn at random."""
    plain = build.transformer_config
    monkeypatch.setattr(build, "transformer_config", lambda *a, **k: plain(*a, **(k | changes)))

    def load(chunks: Any, *_: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        for chunk in chunks:
            biases = [(name, buffer) for name, buffer in chunk.named_buffers() if name.endswith("expert_bias")]
            for name, tensor in sorted([*chunk.named_parameters(), *biases]):
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.data.copy_(1 + 0.2 * noise if "norm" in name else 0.08 * noise)

    monkeypatch.setattr(build, "load_weights", load)
    policy = make_policy(directory, make_config(trainer={"recompute": recompute}))
    monkeypatch.setattr(build, "transformer_config", plain)
    return policy


def routers(policy: Policy) -> list[ReplayRouter]:
    return [module for module in policy.chunks[0].modules() if isinstance(module, ReplayRouter)]


def routed(
    policy: Policy, routing: MicrobatchRouting, router: ReplayRouter, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate weights and map of one router under a record."""
    maps: list[torch.Tensor] = []

    def call() -> torch.Tensor:
        probs, routing_map = router.routing(logits)
        maps.append(routing_map)
        return probs

    return policy.replay.run(routing, call), maps[0]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_replays_every_id_also_when_recomputed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    directory = kind.write(tmp_path / "model", **kind.model)
    found = []
    for recompute in ("none", "full", "selective"):
        policy = policy_of(kind, directory, monkeypatch, recompute)
        step, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
        counts = policy.logprobs(microbatches, step, FORCED).counts
        assert (counts.mismatched_ids, counts.missing) == (0, 0)
        assert counts.replayed == counts.required > 0
        assert (counts.disagree > counts.compared // 2).all(), "random records are not the own choice"
        found.append(accumulate(policy, step, microbatches, FORCED))
    for other in found[1:]:
        assert_agree(found[0], other, "full")


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_weighs_the_recorded_experts_by_its_own_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    policy = policy_of(kind, kind.write(tmp_path / "model", **kind.model), monkeypatch)
    _, (one,) = prepare(policy, make_batch(policy.arch.spec), 12)
    for column, router in enumerate(routers(policy)):
        logits = torch.randn(*one.pads.T.shape, router.num_experts, generator=torch.Generator().manual_seed(column))
        probs, used = routed(policy, routing_of(one), router, logits)
        rows = router_order(torch.from_numpy(one.recorded))
        ids = router_order(torch.from_numpy(one.experts[:, :, column])).long()[rows]
        flat = logits.reshape(len(rows), -1)[rows]
        expected = torch.zeros_like(flat).scatter(1, ids, kind.weights(flat, ids))
        assert torch.equal(used[rows], torch.zeros_like(flat, dtype=torch.bool).scatter(1, ids, True))
        torch.testing.assert_close(probs[rows], expected)


def test_a_router_bias_is_added_and_trained(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(KINDS["GPT-OSS: router bias, top-k then softmax"], model_dir, monkeypatch)
    router = routers(policy)[0]
    hidden = torch.randn(3, 1, 64)
    torch.testing.assert_close(router.gating(hidden), hidden @ router.weight.T + router.bias)
    assert router.bias.abs().max() > 0
    step, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
    _, gradients = accumulate(policy, step, microbatches, FORCED)
    found = [gradient for name, gradient in gradients.items() if name.endswith("router.bias")]
    assert len(found) == 4
    assert all(gradient.abs().max() > 0 for gradient in found)


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
    policy = policy_with(model_dir, monkeypatch, AUXILIARY)
    _, microbatches = prepare(policy, make_batch(policy.arch.spec), 12)
    router = routers(policy)[0].train()
    one = microbatches[0]
    logits = torch.randn(*one.pads.T.shape, 16, generator=torch.Generator().manual_seed(0))
    slopes = []
    for ids in (one.experts, np.roll(one.experts, 1, axis=-1) ^ 1):
        leaf = logits.clone().requires_grad_()
        routing = routing_of(replace(one, experts=ids))
        probs, _ = routed(policy, routing, router, leaf)
        (probs * 0).sum().backward()
        slopes.append(leaf.grad)
    assert slopes[0].abs().max() > 0
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0, atol=0)
    pads = router_order(torch.from_numpy(one.pads))
    assert not slopes[0].reshape(len(pads), -1)[pads].any(), "pads carry no balancing gradient"


def model_with_prediction_layer(arch: Architecture) -> GPTModel:
    """The trainer's decoder and one multi-token-prediction layer of the same kind behind it."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

    layout = transformer_config(arch, dtype=torch.float32, mtp_num_layers=1, mtp_loss_scaling_factor=0.1)
    layout.perform_initialization = True
    layers = [layer_spec(arch, moe=True, replay=True) for _ in arch.spec.moe_layers]
    decoder = TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
    prediction = get_gpt_mtp_block_spec(layout, decoder, use_transformer_engine=False)
    torch.manual_seed(0)
    return GPTModel(
        layout,
        decoder,
        vocab_size=arch.spec.vocab_size,
        max_sequence_length=arch.max_positions,
        position_embedding_type="rope",
        mtp_block_spec=prediction,
    )


def test_multi_token_prediction_routers_are_left_alone(model_dir: Path) -> None:
    policy = make_policy(model_dir)
    arch = policy.arch
    predicting = model_with_prediction_layer(arch)
    context = ReplayContext(predicting, arch.spec)
    decoder = [module for module in predicting.decoder.modules() if isinstance(module, ReplayRouter)]
    (extra,) = (module for module in predicting.mtp.modules() if isinstance(module, ReplayRouter))
    assert [router.context for router in decoder] == [context] * 4
    assert extra.context is None

    _, (one,) = prepare(policy, make_batch(arch.spec), 12)
    tokens, positions, labels = (torch.from_numpy(a.copy()) for a in (one.tokens, one.positions, one.labels))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for router in (*decoder, extra):
        router.register_forward_hook(lambda r, inputs, outputs: seen.append((r.gating(inputs[0]), outputs[1])))
    losses = context.run(routing_of(one), lambda: predicting(tokens, positions, None, labels=labels))
    losses.sum().backward()
    context.require_empty("after backward")
    assert len(seen) == 5
    recorded = router_order(torch.from_numpy(one.recorded))
    for layer, (logits, used) in enumerate(seen):
        own = torch.zeros_like(used).scatter(1, logits.reshape(len(used), -1).topk(4, 1).indices, True)
        differs = (own != used).any(1)
        assert torch.equal(differs, differs & recorded)
        assert differs.any() == (layer < 4), "only decoder layers are forced"


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
            "would reduce the experts' gradients over the wrong ranks",
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
