"""Replay forces exactly the record, in every pass that a microbatch needs, and leaves nothing behind."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from r3.config import Config
from r3.errors import ConfigError, RoutingError
from r3.trainer import replay
from r3.trainer.batching import MicroBatch, StepBatch, microbatch
from r3.trainer.megatron import TopKRouter
from r3.trainer.model import Architecture, build_model, transformer_config
from r3.trainer.outcome import worst_difference
from r3.trainer.policy import Policy, RoutingUse, UpdateSums
from r3.trainer.replay import MicrobatchRouting, ReplayContext, ReplayRouter, router_order
from tests.megatron.toys import BITS_UNDER_RECOMPUTE, gradients, make_batch, make_config, own_routing, prepare

pytestmark = [pytest.mark.megatron, pytest.mark.usefixtures("single_rank")]
FORCED, COMPARED = RoutingUse(force=True), RoutingUse(force=False)
Update = tuple[UpdateSums, dict[str, torch.Tensor]]


def make_policy(directory: Path, config: Config | None = None) -> Policy:
    return Policy(config or make_config(), Architecture.from_directory(directory), directory, updates=10)


def routing_of(microbatch: MicroBatch) -> MicrobatchRouting:
    arrays = (microbatch.experts, microbatch.recorded, microbatch.pads)
    choosing = torch.from_numpy(np.flatnonzero(~microbatch.recorded.T))
    return MicrobatchRouting(*(torch.from_numpy(array) for array in arrays), force=True, choosing=choosing)


def without_row(microbatch: MicroBatch, row: int) -> MicroBatch:
    """The microbatch without the record of one row of every sequence."""
    return replace(microbatch, recorded=microbatch.recorded & (np.arange(microbatch.recorded.shape[1]) != row))


def own_record(policy: Policy, step: StepBatch, microbatches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The microbatches with the model's own choice in the place of the record."""
    own = own_routing(policy, step, microbatches)
    return [replace(m, experts=ids.astype(np.uint8)) for m, ids in zip(microbatches, own, strict=True)]


def accumulate(policy: Policy, step: StepBatch, microbatches: Sequence[MicroBatch], use: RoutingUse | None) -> Update:
    old = step.rollout_logprobs.astype(np.float64)
    sums, _, _ = policy.accumulate(microbatches, step, old, None, use)
    return sums, gradients(policy)


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert max(float(gradient.abs().max()) for gradient in first.values()) > 0
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, msg=name)


def assert_agree(first: Update, second: Update, recompute: str) -> None:
    """To the bit, but under recompute only where Megatron-core's forward pass has one order of sums."""
    if recompute == "none" or BITS_UNDER_RECOMPUTE:
        assert first[0] == second[0]
        assert_same(first[1], second[1])
        return
    assert asdict(first[0]) == pytest.approx(asdict(second[0]), rel=1e-6)
    pairs = ({name: gradient.numpy() for name, gradient in side[1].items()} for side in (first, second))
    worst, name = worst_difference(*pairs)
    assert worst <= 1e-5, name


@pytest.mark.parametrize("size", [12, 5], ids=["one microbatch", "three microbatches"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_replaying_the_own_recording_changes_no_bit(model_dir: Path, recompute: str, size: int) -> None:
    policy = make_policy(model_dir, make_config(trainer={"recompute": recompute}))
    step, microbatches = prepare(policy, make_batch(policy.arch.spec), size)
    plain = accumulate(policy, step, microbatches, None)
    replayed = accumulate(policy, step, own_record(policy, step, microbatches), FORCED)
    assert_agree(plain, replayed, recompute)


def test_recompute_walks_through_the_same_record(model_dir: Path) -> None:
    found = []
    for recompute in ("none", "full"):
        policy = make_policy(model_dir, make_config(trainer={"recompute": recompute}))
        step, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
        found.append(accumulate(policy, step, microbatches, FORCED))
    assert found[0][0] == found[1][0]
    assert_same(found[0][1], found[1][1])


@pytest.mark.parametrize("packed", [False, True])
def test_nothing_depends_on_the_ids_of_filled_rows(model_dir: Path, packed: bool) -> None:
    policy = make_policy(model_dir, make_config(trainer={"packed": packed}))
    step, whole = prepare(policy, make_batch(policy.arch.spec), 12)
    one = microbatch(step, range(12), policy.arch.spec, policy.form) if packed else whole[0]
    assert one.experts is not None
    assert one.filled.sum() >= 12
    assert not (one.filled & one.recorded).any()
    found = []
    for shift in (0, 3):
        other = (one.experts + shift * one.filled[..., None, None]) % policy.arch.spec.num_experts
        changed = replace(one, experts=other.astype(np.uint8))
        logprobs = policy.logprobs([changed], step, FORCED).logprobs
        sums, counts, _ = policy.accumulate([changed], step, step.rollout_logprobs.astype(np.float64), None, FORCED)
        found.append((logprobs, sums, gradients(policy), counts.replayed, counts.mismatched_ids))
    (before, sums, plain, *counts), (after, other_sums, changed_gradients, *other_counts) = found
    np.testing.assert_allclose(after, before, atol=1e-6)
    assert asdict(other_sums) == pytest.approx(asdict(sums), rel=1e-6)
    worst, name = worst_difference(*({n: g.numpy() for n, g in side.items()} for side in (changed_gradients, plain)))
    assert worst <= 1e-5, name
    assert counts == other_counts == [one.recorded.sum(), 0]


def test_a_lost_record_in_backward_would_show_in_the_gradient(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: without the second activation the gradient is another one, the loss is not."""
    policy = make_policy(model_dir, make_config(trainer={"recompute": "full"}))
    step, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
    right = accumulate(policy, step, microbatches, FORCED)
    monkeypatch.setattr(ReplayContext, "_enter_backward", lambda *_: None)
    wrong = accumulate(policy, step, microbatches, FORCED)
    assert wrong[0] == right[0]
    with pytest.raises(AssertionError):
        assert_same(right[1], wrong[1])


def test_the_experts_get_exactly_the_record(model_dir: Path) -> None:
    policy = make_policy(model_dir)
    step, whole = prepare(policy, make_batch(policy.arch.spec), 5)
    microbatches = [without_row(one, 2) for one in whole]
    seen: list[tuple[TopKRouter, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def note(router: TopKRouter, inputs: Any, outputs: Any) -> None:
        seen.append((router, inputs[0], *outputs))

    routers = [module for module in policy.chunks[0].modules() if isinstance(module, TopKRouter)]
    assert len(routers) == 4
    for router in routers:
        router.register_forward_hook(note)
    policy.logprobs(microbatches, step, FORCED)
    calls = iter(seen)
    for one in microbatches:
        given = router_order(torch.from_numpy(one.recorded | one.filled))
        assert 0 < given.sum() < len(given)
        for layer in range(4):
            router, hidden, probs, routing_map = next(calls)
            assert router.layer_number == layer + 1
            ids = router_order(torch.from_numpy(one.experts[:, :, layer])).long()
            logits = (hidden @ router.weight.T).reshape(len(ids), -1)
            own = logits.topk(4, 1).indices
            expected = torch.where(given[:, None], ids, own)
            assert torch.equal(routing_map, torch.zeros_like(routing_map).scatter(1, expected, True))
            weights = logits.gather(1, expected).softmax(1)
            torch.testing.assert_close(probs, torch.zeros_like(probs).scatter(1, expected, weights))
    assert next(calls, None) is None


def test_gradient_reaches_the_router_on_the_recorded_experts_alone(model_dir: Path) -> None:
    policy = make_policy(model_dir)
    step, microbatches = prepare(policy, make_batch(policy.arch.spec), 12)
    router = next(module for module in policy.chunks[0].modules() if isinstance(module, ReplayRouter))
    experts, recorded = (torch.from_numpy(a) for a in (microbatches[0].experts, microbatches[0].recorded))
    logits = torch.randn(*recorded.T.shape, 16, requires_grad=True)
    routing = routing_of(microbatches[0])
    probs = policy.replay.run(routing, lambda: router.routing(logits)[0])
    (probs * torch.randn(probs.shape)).sum().backward()
    gradient = logits.grad.reshape(-1, 16)[router_order(recorded)]
    ids = router_order(experts[:, :, 0])[router_order(recorded)].long()
    chosen = torch.zeros_like(gradient, dtype=torch.bool).scatter(1, ids, True)
    assert torch.equal(gradient != 0, chosen)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(len(gradient)), atol=1e-6, rtol=0)
    accumulated = accumulate(policy, step, microbatches, FORCED)[1]
    routers = [gradient for name, gradient in accumulated.items() if name.endswith("router.weight")]
    assert len(routers) == 4
    assert all(gradient.abs().max() > 0 for gradient in routers)


def test_comparing_does_not_change_the_model(model_dir: Path) -> None:
    policy = make_policy(model_dir)
    step, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
    plain, compared, forced = (policy.logprobs(microbatches, step, use) for use in (None, COMPARED, FORCED))
    np.testing.assert_array_equal(plain.logprobs, compared.logprobs)
    assert np.abs(plain.logprobs - forced.logprobs).max() > 1e-2
    assert compared.counts.replayed == 0
    assert compared.counts.native == compared.counts.compared + len(step.trajectories)
    assert plain.counts.compared == 0


def test_uint16_records_are_widened(model_dir: Path) -> None:
    policy = make_policy(model_dir)
    step, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
    narrow = policy.logprobs(microbatches, step, FORCED)
    wide = policy.logprobs([replace(m, experts=m.experts.astype(np.uint16)) for m in microbatches], step, FORCED)
    np.testing.assert_array_equal(narrow.logprobs, wide.logprobs)


def test_other_models_in_the_process_are_never_replayed(model_dir: Path) -> None:
    policy = make_policy(model_dir, make_config(grpo={"kl_coef": 0.1}))
    step, microbatches = prepare(policy, make_batch(policy.arch.spec), 12)
    other = make_policy(model_dir)
    native = other.logprobs(microbatches, step, None).logprobs
    tokens, positions = (torch.from_numpy(a.copy()) for a in (microbatches[0].tokens, microbatches[0].positions))
    routing = routing_of(microbatches[0])
    inside = policy.replay.run(routing, lambda: other.chunks[0](tokens, positions, None))
    assert torch.equal(inside, other.chunks[0](tokens, positions, None))
    reference = policy.reference_logprobs(microbatches, step)
    np.testing.assert_array_equal(reference, native)


def reference_counts(
    record: np.ndarray, own: np.ndarray, recorded: np.ndarray, sampled: np.ndarray, lags: Sequence[int] = (-1, 0, 1)
) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
    """Disagreement per layer and in any, overlap sums and pairs per layer and lag, row by row in Python."""
    per_layer, anywhere = np.zeros(own.shape[2], int), 0
    overlap, pairs = np.zeros((own.shape[2], len(lags), 2)), np.zeros((own.shape[2], len(lags), 2), int)
    for b, t in zip(*np.nonzero(recorded), strict=True):
        differs = [set(record[b, t, layer]) != set(own[b, t, layer]) for layer in range(own.shape[2])]
        per_layer += differs
        anywhere += any(differs)
        for i, lag in enumerate(lags):
            if 0 <= t + lag < recorded.shape[1] and recorded[b, t + lag]:
                for layer in range(own.shape[2]):
                    shared = len(set(record[b, t + lag, layer]) & set(own[b, t, layer]))
                    overlap[layer, i, int(sampled[b, t])] += shared / own.shape[3]
                    pairs[layer, i, int(sampled[b, t])] += 1
    return per_layer, anywhere, overlap, pairs


def test_counters_equal_a_row_by_row_count(model_dir: Path) -> None:
    policy = make_policy(model_dir)
    step, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
    own = own_routing(policy, step, microbatches)
    # Half of the rows carry the own choice, so that both outcomes occur.
    rng = np.random.default_rng(3)
    mixed = [
        replace(
            m, experts=np.where(rng.random(m.recorded.shape)[:, :, None, None] < 0.5, ids, m.experts).astype(np.uint8)
        )
        for m, ids in zip(microbatches, own, strict=True)
    ]
    counts = policy.logprobs(mixed, step, RoutingUse(force=False, audit=True)).counts
    expected = [reference_counts(m.experts, ids, m.recorded, m.sampled) for m, ids in zip(mixed, own, strict=True)]
    np.testing.assert_array_equal(counts.disagree, sum(e[0] for e in expected))
    assert counts.disagree_any == sum(e[1] for e in expected)
    np.testing.assert_allclose(counts.overlap, np.sum([e[2] for e in expected], 0), rtol=1e-6)
    np.testing.assert_array_equal(counts.overlap_pairs, np.sum([e[3] for e in expected], 0))
    prompts = sum(t.prompt_len for t in step.trajectories)
    assert counts.overlap_pairs[:, 1].tolist() == [[prompts, counts.compared - prompts]] * 4
    # Few rows, so they are one window: the sums over all layers at lag 0.
    np.testing.assert_allclose(counts.windows[0], [counts.overlap[:, 1].sum(), 4 * counts.compared])
    assert not counts.windows[1:].any()
    assert counts.compared == sum(int(m.recorded.sum()) for m in mixed)


def test_row_classes_of_a_replayed_pass(model_dir: Path) -> None:
    policy = make_policy(model_dir)
    step, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
    counts = policy.logprobs(microbatches, step, FORCED).counts
    tokens = step.tokens
    assert counts.required == counts.replayed == counts.compared == tokens - len(step.trajectories)
    assert counts.native == len(step.trajectories), "only last tokens route on their own"
    assert counts.pads == sum(m.tokens.size for m in microbatches) - tokens > 0
    assert (counts.missing, counts.mismatched_ids) == (0, 0)


def test_ids_that_the_router_did_not_use_are_counted(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(model_dir)
    step, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
    forced = replay._Visit.get_replay_topk

    def lazy(visit: Any, scores: torch.Tensor, topk: int, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        forced(visit, scores, topk, *rest)
        return torch.topk(scores, topk, dim=1)

    monkeypatch.setattr(replay._Visit, "get_replay_topk", lazy)
    counts = policy.logprobs(microbatches, step, FORCED).counts
    assert counts.mismatched_ids > counts.compared
    assert counts.replayed < counts.required


def test_a_router_that_does_not_take_part_is_found(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(model_dir)
    step, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
    router = [module for module in policy.chunks[0].modules() if isinstance(module, ReplayRouter)][2]
    router.context = None
    with pytest.raises(RoutingError, match="layer 2 was consulted 0 times in 3 microbatches"):
        policy.logprobs(microbatches, step, FORCED)
    router.context = policy.replay
    monkeypatch.setattr(TopKRouter, "routing", lambda self, logits, **_: (logits, logits > 0))
    with pytest.raises(RoutingError, match="layer 0 never asked for replay"):
        policy.logprobs(microbatches, step, FORCED)


def failing(*_: Any) -> Any:
    raise FloatingPointError("on purpose")


def fail_in_forward(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    router = [module for module in policy.chunks[0].modules() if isinstance(module, ReplayRouter)][1]
    monkeypatch.setattr(router, "gating", failing)


def fail_in_loss(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "_policy_loss", failing)


def fail_in_backward(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    visit = ReplayContext.visit

    def fail_when_recomputed(context: ReplayContext, layer: int) -> Any:
        found = visit(context, layer)
        return failing() if found is not None and found._active.counts is None and layer == 1 else found

    monkeypatch.setattr(ReplayContext, "visit", fail_when_recomputed)


@pytest.mark.parametrize("fault", [fail_in_forward, fail_in_loss, fail_in_backward])
def test_nothing_is_left_after_an_exception(
    model_dir: Path, fault: Callable[[Policy, pytest.MonkeyPatch], None]
) -> None:
    policy = make_policy(model_dir, make_config(trainer={"recompute": "full"}))
    step, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
    right = accumulate(policy, step, microbatches, FORCED)
    with pytest.MonkeyPatch.context() as patch:
        fault(policy, patch)
        with pytest.raises(FloatingPointError):
            accumulate(policy, step, microbatches, FORCED)
    policy.replay.require_empty("after the exception")
    again = accumulate(policy, step, microbatches, FORCED)
    assert again[0] == right[0]
    assert_same(right[1], again[1])


@pytest.mark.parametrize(("recompute", "intervals"), [("none", 1 + 4 + 4 + 1), ("full", 1 + 4 + 4 + 1 + 4)])
def test_the_own_time_covers_every_part_of_replay(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, recompute: str, intervals: int
) -> None:
    """The record's way to the device, force and account of 4 layers, the count; force again where it is recomputed; and
    what is left to count behind the pass.
    """
    policy = make_policy(model_dir, make_config(trainer={"recompute": recompute}))
    step, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
    ticks = itertools.count()
    monkeypatch.setattr(replay.time, "perf_counter", lambda: float(next(ticks)))
    _, _, seconds = policy.accumulate(microbatches, step, step.rollout_logprobs.astype(np.float64), None, FORCED)
    # Counting reads the clock twice more, round the choice that is no part of replay: 3 ticks less 1.
    assert seconds == (intervals + 1) * len(microbatches) + 1


def test_nothing_is_left_after_ordinary_passes(model_dir: Path) -> None:
    policy = make_policy(model_dir, make_config(trainer={"recompute": "full"}))
    step, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
    policy.logprobs(microbatches, step, FORCED)
    policy.replay.require_empty("after a forward-only pass")
    accumulate(policy, step, microbatches, FORCED)
    policy.replay.require_empty("after a training pass")
    # Whatever came before, a pass without records is native.
    plain = policy.logprobs(microbatches, step, None)
    np.testing.assert_array_equal(plain.logprobs, make_policy(model_dir).logprobs(microbatches, step, None).logprobs)


def test_a_microbatch_left_active_is_an_error(model_dir: Path) -> None:
    policy = make_policy(model_dir)
    _, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
    routing = routing_of(microbatches[0])
    with pytest.raises(RoutingError, match="left over"):
        policy.replay.run(routing, lambda: policy.replay.run(routing, lambda: torch.zeros(1)))


@pytest.mark.parametrize("cut", [np.s_[:, :-1], np.s_[:, :, :-1], np.s_[..., :-1]], ids=["rows", "layers", "top-k"])
def test_records_of_another_shape_are_refused(model_dir: Path, cut: Any) -> None:
    policy = make_policy(model_dir)
    step, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
    short = [replace(m, experts=m.experts[cut]) for m in microbatches]
    with pytest.raises(RoutingError, match=r"\[b, s, layers, k\]"):
        policy.logprobs(short, step, FORCED)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("moe_router_fusion", True, "fused"),
        ("moe_router_load_balancing_type", "sinkhorn", "sinkhorn"),
        ("moe_router_load_balancing_type", ["quantile_balancing"], "quantiles"),
        ("moe_expert_capacity_factor", 1.0, "drops"),
        ("cuda_graph_impl", "local", "freeze"),
        ("moe_enable_routing_replay", True, "same hook"),
        ("moe_router_force_load_balancing", True, "noise"),
        ("overlap_moe_expert_parallel_comm", True, "two microbatches"),
    ],
)
def test_routers_that_cannot_be_replayed_are_refused(model_dir: Path, field: str, value: object, reason: str) -> None:
    arch = Architecture.from_directory(model_dir)
    layout = transformer_config(arch, dtype=torch.float32)
    setattr(layout, field, value)
    with pytest.raises(ConfigError, match=reason):
        build_model(arch, layout, replay=True)


def test_binding_checks_the_live_model(model_dir: Path) -> None:
    arch = Architecture.from_directory(model_dir)
    layout = transformer_config(arch, dtype=torch.float32)
    model = build_model(arch, layout, replay=True)
    with pytest.raises(RoutingError, match=r"routers in layers \[0, 1, 2, 3\], its MoE layers are \[0, 2, 3\]"):
        ReplayContext(model, replace(arch.spec, moe_layers=(0, 2, 3)))
    with pytest.raises(RoutingError, match="4 of 16 experts, the checkpoint says 2 of 16"):
        ReplayContext(model, replace(arch.spec, top_k=2))
    ReplayContext(model, arch.spec)
    with pytest.raises(RoutingError, match="bound to another context"):
        ReplayContext(model, arch.spec)
    with pytest.raises(RoutingError, match="built without replay"):
        ReplayContext(build_model(arch, layout, replay=False), arch.spec)


def test_dense_layers_have_no_column(tmp_path: Path) -> None:
    from tests.megatron.toys import write_model

    policy = make_policy(write_model(tmp_path / "dense", mlp_only_layers=[0, 2]))
    assert policy.arch.spec.moe_layers == (1, 3)
    step, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
    plain = accumulate(policy, step, microbatches, None)
    replayed = accumulate(policy, step, own_record(policy, step, microbatches), FORCED)
    assert_same(plain[1], replayed[1])
