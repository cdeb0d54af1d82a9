"""Every limit of Megatron-core's own RouterReplay, here handled or refused; and faults that the checks must find.

The rows of `LIMITS` are the topics on which Megatron-core's native replay (PRs #2101 and #2693) is silent, wrong or
needs care of its caller; `scripts/bench/native_replay.py` shows some of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from r3.errors import ConfigError, RoutingError
from r3.routing import RoutingTrace
from r3.trainer.model import Architecture, build_model, transformer_config
from r3.trainer.outcome import Rehearsal, worst_difference
from r3.trainer.policy import Policy, RoutingUse
from r3.trainer.rehearsal import rehearse
from r3.trainer.replay import ReplayContext, ReplayRouter, router_order
from r3.types import Batch, ModelSpec
from tests.gloo_pool import GlooPool
from tests.megatron import test_replay, test_routers
from tests.megatron.layouts import laid_out, layout_config, run_layout
from tests.megatron.test_replay import accumulate, assert_same, make_policy, routing_of
from tests.megatron.test_routers import SIGMOID, policy_with, routed, routers
from tests.megatron.toys import make_batch, make_config, prepare, write_model

pytestmark = [pytest.mark.megatron, pytest.mark.usefixtures("single_rank")]
FORCED = RoutingUse(force=True)


@dataclass(frozen=True)
class Bench:
    """What a case works with."""

    directory: Path
    scratch: Path
    patch: pytest.MonkeyPatch
    pool: Callable[[], GlooPool]

    def policy(self, changes: dict[str, Any] | None = None, recompute: str = "none", **model: Any) -> Policy:
        """A policy with these fields of Megatron's configuration and these of the checkpoint."""
        directory = write_model(self.scratch / "model", **model) if model else self.directory
        if changes:
            return policy_with(directory, self.patch, changes, recompute)
        return make_policy(directory, make_config(trainer={"recompute": recompute}))

    def counts(self, policy: Policy, **changes: Any) -> Any:
        """Counters of a replayed log-prob pass."""
        step, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
        return policy.logprobs([replace(m, **changes) for m in microbatches], step, FORCED).counts

    def refused(self, reason: str, **fields: Any) -> None:
        """Building a replayed model under these fields of Megatron's configuration says why not."""
        arch = Architecture.from_directory(self.directory)
        layout = transformer_config(arch, dtype=torch.float32)
        for field, value in fields.items():
            setattr(layout, field, value)
        with pytest.raises(ConfigError, match=reason):
            build_model(arch, layout, replay=True)

    def layout(self, changes: dict[str, Any], **trainer: Any) -> None:
        """Two processes in a layout give the single process's loss and gradients."""
        batch = make_batch(ModelSpec.from_directory(self.directory))
        trainer = {"packed": True, "recompute": "full", "micro_batch_size": 2} | trainer
        config = layout_config(changes, 2, trainer=trainer)
        found = self.pool().run(run_layout, config, self.directory, batch)[0]
        expected = single_process(self.directory, batch)
        assert found.counts.mismatched_ids == found.counts.missing == 0
        assert found.counts.replayed == found.counts.required == batch.stored.rows
        assert found.loss == pytest.approx(expected.loss, abs=1e-6)
        assert worst_difference(found.gradients, expected.gradients)[0] <= 1e-5


def single_process(directory: Path, batch: Batch) -> Rehearsal:
    config = make_config(trainer={"packed": False, "micro_batch_size": 64})
    policy = Policy(config, Architecture.from_directory(directory), directory, updates=10)
    return rehearse(policy, *laid_out(policy, config, batch), FORCED)


def exact(bench: Bench, policy: Policy) -> None:
    counts = bench.counts(policy)
    assert (counts.mismatched_ids, counts.missing) == (0, 0)
    assert counts.replayed == counts.required > 0


def every_integer_width(bench: Bench) -> None:
    policy = bench.policy()
    step, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
    found = [
        policy.logprobs([replace(m, experts=m.experts.astype(dtype)) for m in microbatches], step, FORCED).logprobs
        for dtype in (np.uint8, np.uint16, np.int32, np.int64)
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def no_fractions(bench: Bench) -> None:
    policy = bench.policy()
    step, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
    with pytest.raises(RoutingError, match=r"torch.float32.*integer ids"):
        policy.logprobs([replace(m, experts=m.experts.astype(np.float32)) for m in microbatches], step, FORCED)


def wrong_record(
    change: Callable[[np.ndarray], np.ndarray], reason: str, where: str = "record"
) -> Callable[[Bench], None]:
    """A record `[rows, layers, k]` that is made wrong before (`record`) or after it was checked and signed."""

    def case(bench: Bench) -> None:
        spec = ModelSpec.from_directory(bench.directory)
        good = make_batch(spec, 1, 1).trajectory(0)
        assert good.routing is not None
        wide = change(good.routing.experts.astype(np.int64))
        if where == "record":
            with pytest.raises(RoutingError, match=reason):
                RoutingTrace.record(
                    wide, good.tokens, layers=spec.moe_layers, num_experts=16, weight_version=0, engine="test"
                )
            return
        policy = bench.policy()
        bad = replace(good, routing=replace(good.routing, experts=wide.astype(np.uint8)))
        with pytest.raises(RoutingError, match=reason):
            prepare(policy, Batch.pack([bad]), 5)

    return case


def repeat_an_id(wide: np.ndarray) -> np.ndarray:
    wide[3, 1, 1] = wide[3, 1, 0]
    return wide


def set_an_id(value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(wide: np.ndarray) -> np.ndarray:
        wide[3, 1, 1] = value
        return wide

    return change


def short_rows_use_the_own_routing(bench: Bench) -> None:
    """A record that says that it is short is honest: its missing rows are counted, and routed natively."""
    policy = bench.policy()
    step, (one,) = prepare(policy, make_batch(policy.arch.spec), 12)
    gap = one.recorded & (np.arange(one.recorded.shape[1]) != 2)
    counts = policy.logprobs([replace(one, recorded=gap)], step, FORCED).counts
    assert counts.replayed == gap.sum() == one.recorded.sum() - len(one.recorded)
    assert counts.mismatched_ids == 0


def no_global_list(bench: Bench) -> None:
    from megatron.core.transformer.moe.router_replay import RouterReplay

    policy = make_policy(bench.directory, make_config(grpo={"kl_coef": 0.1}))
    make_policy(bench.directory)
    exact(bench, policy)
    assert RouterReplay.global_router_replay_instances == []
    test_replay.test_other_models_in_the_process_are_never_replayed(bench.directory)


def groups_do_not_bound_the_record(bench: Bench) -> None:
    changes = SIGMOID | {"moe_router_num_groups": 4, "moe_router_group_topk": 1}
    policy = bench.policy(changes)
    step, (one,) = prepare(policy, make_batch(policy.arch.spec), 12)
    groups = np.sort(one.experts[one.recorded] // 4, -1)
    assert (np.diff(groups, axis=-1) > 0).any(-1).mean() > 0.9, "the record spreads over more than one group"
    counts = policy.logprobs([one], step, FORCED).counts
    assert (counts.mismatched_ids, counts.replayed) == (0, counts.required)
    # An update, in which the rows of a gap choose for themselves.
    gap = replace(one, recorded=one.recorded & (np.arange(one.recorded.shape[1]) != 2))
    old = step.rollout_logprobs.astype(np.float64)
    _, counts, _ = policy.accumulate([gap], step, old, None, replace(FORCED, compare=False))
    assert (counts.mismatched_ids, counts.replayed) == (0, gap.recorded.sum())


def expert_bias_counts_what_was_used(bench: Bench) -> None:
    policy = bench.policy(SIGMOID, "full")
    step, (one,) = prepare(policy, make_batch(policy.arch.spec), 12)
    exact(bench, policy)
    maps: dict[int, torch.Tensor] = {}

    def note(router: ReplayRouter, _: Any, outputs: Any) -> None:
        maps.setdefault(router.layer_number, outputs[1])

    for router in routers(policy):
        router.register_forward_hook(note)
    # Megatron turns the statistic into the bias at the end of the step; keep it to look at.
    bench.patch.setattr(policy._layout, "finalize_model_grads_func", lambda *_, **__: None)
    accumulate(policy, step, [one], FORCED)
    real = ~router_order(torch.from_numpy(one.pads))
    for router in routers(policy):
        assert torch.equal(router.local_tokens_per_expert.long(), maps[router.layer_number][real].sum(0))


def auxiliary_loss_is_the_trainers_own(bench: Bench) -> None:
    test_routers.test_the_auxiliary_loss_uses_the_own_top_k(bench.directory, bench.patch)


def z_loss_is_unchanged(bench: Bench) -> None:
    """Its gradient at the router's logits is the same with, without and under another record."""
    policy = bench.policy({"moe_z_loss_coeff": 1e-2})
    _, (one,) = prepare(policy, make_batch(policy.arch.spec), 12)
    router = routers(policy)[0].train()
    logits, slopes = torch.randn(*one.pads.T.shape, 16, generator=torch.Generator().manual_seed(0)), []
    for experts in (one.experts, one.experts ^ 1, None):
        leaf = logits.clone().requires_grad_()
        routing = replace(routing_of(one), experts=None if experts is None else torch.from_numpy(experts))
        probs, _ = routed(policy, routing, router, leaf)
        (probs * 0).sum().backward()
        slopes.append(leaf.grad)
    assert slopes[0].abs().max() > 0
    assert torch.equal(slopes[0], slopes[1])
    assert torch.equal(slopes[0], slopes[2])


def jitter_is_drawn_once(bench: Bench) -> None:
    """Input jitter moves the logits, never the replayed ids; recomputation repeats the draw."""
    found = []
    for recompute in ("none", "full"):
        policy = bench.policy({"moe_input_jitter_eps": 0.1}, recompute)
        exact(bench, policy)
        step, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
        torch.manual_seed(0)
        found.append(accumulate(policy, step, microbatches, FORCED))
    assert_same(found[0][1], found[1][1])
    still = bench.policy({"moe_input_jitter_eps": None})
    assert accumulate(still, step, microbatches, FORCED)[0].loss != found[0][0].loss


def prediction_layers(bench: Bench) -> None:
    test_routers.test_multi_token_prediction_routers_are_left_alone(bench.directory)


def dense_layers(bench: Bench) -> None:
    policy = bench.policy(mlp_only_layers=[0, 1])
    assert [router.layer_number for router in routers(policy)] == [3, 4]
    assert policy.replay.columns == (0, 1)
    exact(bench, policy)


def layers_by_number(bench: Bench) -> None:
    """Columns follow layer numbers, not the order in which routers were built."""
    arch = Architecture.from_directory(bench.directory)
    again = build_model(arch, transformer_config(arch, dtype=torch.float32), replay=True)
    again.decoder.layers = torch.nn.ModuleList(reversed(again.decoder.layers))
    context = ReplayContext(again, arch.spec)
    bound = [module for module in again.decoder.modules() if isinstance(module, ReplayRouter)]
    assert [context._local[router.layer_number - 1] for router in bound] == [3, 2, 1, 0]


def refuses(reason: str, **fields: Any) -> Callable[[Bench], None]:
    return lambda bench: bench.refused(reason, **fields)


def lays_out(changes: dict[str, Any], **trainer: Any) -> Callable[[Bench], None]:
    return lambda bench: bench.layout(changes, **trainer)


def foreign_checkpoint(reentrant: bool) -> Callable[[Bench], None]:
    return lambda bench: test_routers.test_a_checkpoint_function_without_megatrons_flags(
        bench.directory, bench.patch, reentrant
    )


LIMITS: dict[str, dict[str, Callable[[Bench], None]]] = {
    "index dtype": {"any integer": every_integer_width, "no fractions": no_fractions},
    "wrong input": {
        "fewer tokens than it claims": wrong_record(lambda w: w[:-1], "do not add up", "signed"),
        "fewer tokens, said so": short_rows_use_the_own_routing,
        "more tokens": wrong_record(lambda w: np.concatenate([w, w[:1]]), "the last token was never an input"),
        "another k": wrong_record(lambda w: w[..., :2], "the model has", "signed"),
        "fewer layers": wrong_record(lambda w: w[:, :-1], r"4 MoE layers, k\] is required"),
        "duplicate ids": wrong_record(repeat_an_id, "row 3, layer 1 repeats an expert"),
        "duplicate ids in transport": wrong_record(repeat_an_id, "row 3, layer 1 repeats an expert", "signed"),
        "-1": wrong_record(set_an_id(-1), "outside|never"),
        "E": wrong_record(set_an_id(16), "16 is outside|outside"),
        "E in transport": wrong_record(set_an_id(16), r"expert id 16 is outside \[0, 16\)", "signed"),
        "shifted by one": wrong_record(lambda w: np.roll(w, 1, 0), "checksum", "signed"),
    },
    "global list": {"two models": no_global_list},
    "PP/VPP": {
        "layer numbers": layers_by_number,
        "pp2+vpp2": lays_out({"pipeline_parallel": 2, "virtual_pipeline": 2}),
        "pp2 packed allgather": lays_out({"pipeline_parallel": 2, "dispatcher": "allgather"}),
    },
    "CP/SP": {"tp2": lays_out({"tensor_parallel": 2}), "cp2": lays_out({"context_parallel": 2})},
    "group-limited": {"forced across groups": groups_do_not_bound_the_record},
    "expert bias": {"counts the used": expert_bias_counts_what_was_used},
    "aux loss": {"own top-k": auxiliary_loss_is_the_trainers_own},
    "z-loss, jitter": {"z-loss": z_loss_is_unchanged, "jitter": jitter_is_drawn_once},
    "capacity/drop": {"refused": refuses("drops replayed tokens", moe_expert_capacity_factor=1.0)},
    "sinkhorn": {
        "refused": refuses("sinkhorn or quantiles", moe_router_load_balancing_type="sinkhorn"),
        "quantile balancing": refuses("sinkhorn or quantiles", moe_router_load_balancing_type=["quantile_balancing"]),
    },
    "router fusion": {"refused": refuses("the fused kernel never asks", moe_router_fusion=True)},
    "MTP": {"left alone": prediction_layers},
    "dense first layers": {"no column": dense_layers},
    "CUDA graphs": {
        "local": refuses("freeze the first microbatch", cuda_graph_impl="local"),
        "Transformer Engine": refuses("freeze the first microbatch", cuda_graph_impl="transformer_engine"),
        "old flag": refuses("freeze the first microbatch", enable_cuda_graph=True),
    },
    "TE checkpoint": {"reentrant": foreign_checkpoint(True), "not reentrant": foreign_checkpoint(False)},
}
CASES = {f"{topic}: {name}": case for topic, cases in LIMITS.items() for name, case in cases.items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_limit_is_handled_or_refused(
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    case: Callable[[Bench], None],
) -> None:
    case(Bench(model_dir, tmp_path, monkeypatch, lambda: request.getfixturevalue("gloo_pool")))


def keep_the_microbatch_of_a_forward(patch: pytest.MonkeyPatch) -> None:
    run = ReplayContext.run

    def stale(context: ReplayContext, routing: Any, *rest: Any) -> torch.Tensor:
        output = run(context, routing, *rest)
        context._active = test_replay.replay._Active(routing, None)
        return output

    patch.setattr(ReplayContext, "run", stale)


def keep_the_microbatch_of_a_backward(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReplayContext, "_leave_backward", lambda _: None)


def never_bind_one_router(patch: pytest.MonkeyPatch) -> None:
    bind = ReplayContext.__init__

    def forget(context: ReplayContext, chunks: Any, spec: ModelSpec) -> None:
        bind(context, chunks, spec)
        layer_of(chunks, 2).mlp.router.context = None

    patch.setattr(ReplayContext, "__init__", forget)


def put_in_another_router(patch: pytest.MonkeyPatch) -> None:
    """A layer gets a router of its own after the model was bound, with the same weights."""
    bind = ReplayContext.__init__

    def swap(context: ReplayContext, chunks: Any, spec: ModelSpec) -> None:
        bind(context, chunks, spec)
        layer = layer_of(chunks, 2)
        bound = layer.mlp.router
        layer.mlp.router = orphan = ReplayRouter(bound.config, groups_of(bound))
        orphan.set_layer_number(bound.layer_number)
        orphan.weight = bound.weight

    patch.setattr(ReplayContext, "__init__", swap)


def layer_of(chunks: Any, index: int) -> Any:
    """A layer of the only chunk of a model."""
    (chunk,) = chunks
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk.decoder.layers[index]


def groups_of(router: ReplayRouter) -> Any:
    """The process groups that a router was built with."""
    return SimpleNamespace(
        tp=router.tp_group, cp=router.cp_group, tp_cp=router.tp_cp_group, tp_dp_cp=router.tp_dp_cp_group
    )


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "a stale microbatch behind a forward pass": (keep_the_microbatch_of_a_forward, "left over"),
    "a stale microbatch behind a backward pass": (keep_the_microbatch_of_a_backward, "left over"),
    "a router that was never bound": (never_bind_one_router, "layer 2 was consulted 0 times in 3 microbatches"),
    "a router that came later": (put_in_another_router, "layer 2 was consulted 0 times in 3 microbatches"),
}


@pytest.mark.parametrize(("fault", "reason"), FAULTS.values(), ids=FAULTS)
def test_faults_are_noticed(
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch], None],
    reason: str,
) -> None:
    with monkeypatch.context() as patch:
        fault(patch)
        policy = make_policy(model_dir, make_config(trainer={"recompute": "full"}))
        step, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
        with pytest.raises(RoutingError, match=reason):
            accumulate(policy, step, microbatches, FORCED)
    policy.replay.require_empty("after the fault was found")


def test_a_router_outside_the_decoder_layers_is_an_error(model_dir: Path) -> None:
    """Routers are found by walking the decoder: one that stands for no layer of it does not go unseen."""
    arch = Architecture.from_directory(model_dir)
    again = build_model(arch, transformer_config(arch, dtype=torch.float32), replay=True)
    stray = again.decoder.layers[0].mlp.router
    extra = ReplayRouter(stray.config, groups_of(stray))
    extra.set_layer_number(9)
    again.decoder.extra = extra
    with pytest.raises(RoutingError, match=r"routers in layers \[0, 1, 2, 3, 8\], its MoE layers are"):
        ReplayContext(again, arch.spec)
