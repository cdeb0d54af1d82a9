"""Counting some layers at once gives what counting layer by layer gives, and a router call stays a few operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from r3 import metrics
from r3.audit import LAGS
from r3.errors import ConfigError
from r3.metrics import AUDIT_WINDOWS
from r3.trainer import counting, replay, routed
from r3.trainer.counting import PassCounts, Undecided
from r3.trainer.replay import MicrobatchRouting, router_order
from r3.trainer.routed import RoutedRecord
from r3.trainer.rows import RowClasses
from r3.trainer.sampling import AuditRows, audit_rows
from r3.trainer.tally import Tally
from r3.trainer.use import RoutingUse
from r3.types import ModelSpec
from tests.megatron.test_replay import assert_same, make_policy
from tests.megatron.toys import gradients, make_batch, make_config, prepare

pytestmark = pytest.mark.megatron
MODEL_LAYERS, LAYERS, FIRST, K, EXPERTS = 9, 6, 2, 3, 8
CPU = torch.device("cpu")
MODEL = ModelSpec("qwen3_moe", MODEL_LAYERS, tuple(range(MODEL_LAYERS)), EXPERTS, K, 8, 100)


@dataclass(frozen=True, slots=True)
class Case:
    """Random visits of one microbatch `[b, s]`; `own`, `maps`: by local layer, the own ids and the used experts."""

    experts: np.ndarray
    recorded: np.ndarray
    rows: AuditRows
    own: tuple[torch.Tensor, ...]
    maps: tuple[torch.Tensor, ...]


def make_case(seed: int, shape: tuple[int, int]) -> Case:
    rng = np.random.default_rng(seed)
    b, s = shape

    def ids(*lead: int) -> np.ndarray:
        return np.argsort(rng.random((*lead, EXPERTS)), -1)[..., :K]

    experts = ids(b, s, LAYERS).astype(np.uint8)
    recorded = rng.random(shape) < 0.8
    flat = experts.swapaxes(0, 1).reshape(b * s, LAYERS, K)
    own, maps = [], []
    for layer in range(LAYERS):
        # Half of the rows agree with the record, and most of them are followed.
        rows = np.where(rng.random((b * s, 1)) < 0.5, flat[:, layer, ::-1], ids(b * s))
        used = np.where(rng.random((b * s, 1)) < 0.9, flat[:, layer], ids(b * s))
        own.append(torch.from_numpy(rows.astype(np.int64)))
        maps.append(torch.zeros(b * s, EXPERTS, dtype=torch.bool).scatter(1, torch.from_numpy(used.astype(int)), True))
    windows = np.where(rng.random(shape) < 0.7, rng.integers(0, AUDIT_WINDOWS, shape), -1)
    order = np.arange(b * s).reshape(shape) + (rng.random(shape) < 0.1)
    return Case(
        experts, recorded, audit_rows(recorded, order, windows, rng.random(shape) < 0.5), tuple(own), tuple(maps)
    )


def slow_counts(tally: Tally, case: Case, forced: Sequence[int]) -> dict[str, Any]:
    """Row by row, layer by layer, in Python; `tally` only says how long the counters are."""
    found = {name: torch.zeros_like(getattr(tally, name)).numpy() for name in COUNTERS}
    pairs, window_pairs = np.zeros_like(tally.overlap_pairs), np.zeros_like(tally.window_pairs)
    b, s = case.recorded.shape
    record = case.experts.swapaxes(0, 1).reshape(b * s, LAYERS, K)
    recorded = case.recorded.T.reshape(-1)
    differs = np.zeros((LAYERS, b * s), bool)
    for layer in range(LAYERS):
        column, own, used = FIRST + layer, case.own[layer].numpy(), case.maps[layer].numpy()
        for t in np.flatnonzero(recorded):
            differs[layer, t] = set(own[t]) != set(record[t, layer])
            found["loads"][column, record[t, layer]] += 1
            if layer in forced:
                left = int((~used[t, record[t, layer]]).sum())
                found["mismatched_ids"] += left
                found["followed"][column] += left == 0
        found["disagree"][column] = differs[layer].sum()
        for lag, (mine, other, sampled) in enumerate(zip(*parts_of(case.rows), strict=True)):
            for index, (t, u, kind) in enumerate(zip(mine, other, sampled, strict=True)):
                shared = len(set(own[t]) & set(record[u, layer]))
                found["overlap"][column, lag, int(kind)] += shared
                pairs[column, lag, int(kind)] += 1
                if LAGS[lag] == 0:
                    found["windows"][case.rows.window[index]] += shared
                    window_pairs[case.rows.window[index]] += 1
    found["compared"] += recorded.sum()
    return found | {"overlap_pairs": pairs, "window_pairs": window_pairs, "differs": differs}


COUNTERS = ("disagree", "followed", "loads", "overlap", "windows", "compared", "mismatched_ids")


def parts_of(rows: AuditRows) -> tuple[Any, Any, Any]:
    return rows.own, rows.record, rows.sampled


def routing_of(case: Case, **changes: Any) -> MicrobatchRouting:
    recorded = torch.from_numpy(case.recorded)
    return MicrobatchRouting(torch.from_numpy(case.experts), recorded, ~recorded, force=True, **changes)


def counted(
    tally: Tally,
    cases: Sequence[tuple[Case, MicrobatchRouting]],
    forced: Sequence[int],
    chunks: Sequence[Sequence[int]] = (range(LAYERS),),
    undecided: Sequence[int] = (),
) -> None:
    """Let the routers of every chunk report each microbatch, then count.

    `undecided`: layers that give scores, in every microbatch but the second.
    """
    kept = PassCounts(tally)
    for chunk, layers in enumerate(chunks):
        for index, (case, routing) in enumerate(cases):
            counts = kept.begin(routing, RoutedRecord(routing), chunk)
            for layer in layers:
                used = case.maps[layer] if layer in forced else None
                own = case.own[layer]
                scores = torch.zeros(len(own), EXPERTS).scatter(1, own, 1.0)
                waits = layer in undecided and index != 1
                counts.add(layer, FIRST + layer, Undecided(scores, choose) if waits else own, used)
            counts.finish()
    kept.count()


def choose(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, ids = scores.topk(K, 1)
    return values, ids


def audit_of(case: Case) -> dict[str, Any]:
    return {"audit": lambda: case.rows, "audited": len(case.rows.window)}


ROOMS = {"all layers at once": None, "two at once": 2, "each alone": 0}


@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS)
@pytest.mark.parametrize("forced", [range(LAYERS), (), (0, 1, 4)], ids=["all forced", "none forced", "some forced"])
@pytest.mark.parametrize("chunks", [[range(LAYERS)], [range(3), range(3, LAYERS), range(0)]], ids=["one", "chunks"])
@pytest.mark.parametrize("undecided", [(), range(LAYERS), (1, 2)], ids=["decided", "scores", "some scores"])
def test_layers_counted_at_once_are_those_counted_alone(
    monkeypatch: pytest.MonkeyPatch,
    room: int | None,
    forced: Sequence[int],
    chunks: Sequence[range],
    undecided: Sequence[int],
) -> None:
    tally, cases = Tally.zero(MODEL, CPU), [make_case(0, (3, 10)), make_case(1, (1, 30)), make_case(2, (2, 9))]
    if room is not None:
        audited = max(len(case.rows.window) for case in cases)
        per_layer = 30 * (K * (16 + K) + 2 * (EXPERTS + K)) + 3 * audited * K * (16 + K)
        monkeypatch.setattr(counting, "ROOM_BYTES", room * per_layer)
        monkeypatch.setattr(routed, "WIDE_BYTES", 0)
    counted(
        tally, [(case, routing_of(case, **audit_of(case), trace=True)) for case in cases], forced, chunks, undecided
    )
    expected = [slow_counts(tally, case, forced) for case in cases]
    for name in (*COUNTERS, "overlap_pairs", "window_pairs"):
        total = sum(one[name] for one in expected)
        assert total.any() or (name in ("followed", "mismatched_ids") and not forced), name
        np.testing.assert_array_equal(np.asarray(getattr(tally, name)), total, err_msg=name)
    for index, one in enumerate(expected):
        np.testing.assert_array_equal(tally.differs[index].numpy(), one["differs"].any(0))
        assert sorted(tally.flags[index]) == list(range(FIRST, FIRST + LAYERS))
        for layer in range(LAYERS):
            np.testing.assert_array_equal(tally.flags[index][FIRST + layer].numpy(), one["differs"][layer])
    assert tally.visits == dict.fromkeys(range(FIRST, FIRST + LAYERS), len(cases))
    tally.require_all_visited({layer: FIRST + layer for layer in range(LAYERS)}, len(chunks))


@pytest.mark.parametrize("layers", [0, 2, 5, 40], ids=["each layer alone", "two", "five", "many microbatches"])
@pytest.mark.parametrize("waits", [False, True], ids=["decided", "scores"])
def test_no_more_is_counted_at_once_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch, layers: int, waits: bool
) -> None:
    cases = [make_case(seed, (3, 10)) for seed in range(12)]
    scores = torch.zeros(30, EXPERTS)
    per_layer = 30 * (K * (16 + K) + 2 * (EXPERTS + K)) + (2 * scores.nbytes if waits else 0)
    monkeypatch.setattr(counting, "ROOM_BYTES", layers * per_layer)
    found, count = [], counting._Joined.count

    def counts(joined: counting._Joined) -> None:
        found.append(sum(len(block.own) for block in joined._blocks))
        count(joined)

    monkeypatch.setattr(counting._Joined, "count", counts)
    kept = PassCounts(Tally.zero(MODEL, CPU))
    for case in cases:
        routing = routing_of(case)
        microbatch = kept.begin(routing, RoutedRecord(routing))
        for layer in range(LAYERS):
            own = Undecided(scores, choose) if waits else case.own[layer]
            microbatch.add(layer, FIRST + layer, own, case.maps[layer])
        microbatch.finish()
    kept.count()
    assert sum(found) == 12 * LAYERS
    # Blocks are whole microbatches where one fits, and of several microbatches only whole blocks are counted at once.
    assert max(found) == {0: 1, 2: 2, 5: 5, 40: 36}[layers]


def test_the_choice_that_routers_make_anyway_is_none_of_replays_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(counting.time, "perf_counter", lambda: clock[0])

    def slow(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        clock[0] += 5
        return choose(scores)

    case, tally = make_case(0, (3, 10)), Tally.zero(MODEL, CPU)
    routing, kept = routing_of(case), PassCounts(tally)
    microbatch = kept.begin(routing, RoutedRecord(routing))
    for layer in range(LAYERS):
        microbatch.add(layer, FIRST + layer, Undecided(torch.zeros(30, EXPERTS), slow), case.maps[layer])
    microbatch.finish()
    begin = clock[0]
    kept.count()
    tally.spent_since(begin)
    assert (clock[0], tally.seconds) == (5, 0)


@pytest.mark.usefixtures("single_rank")
def test_a_stage_without_routers_compares_rows_and_finds_no_difference() -> None:
    tally = Tally.zero(MODEL, CPU)
    tally.recorded[0], tally.recorded[1] = torch.tensor([True, False, True]), torch.tensor([True])
    tally.differs[1] = torch.tensor([True])
    found = tally.counts(RowClasses())
    assert (found.compared, found.disagree_any) == (3, 1)


@pytest.mark.parametrize("forced", [range(LAYERS), (), (0, 1, 4)], ids=["all forced", "none forced", "some forced"])
def test_recorded_rows_that_repeat_an_expert_are_counted(forced: Sequence[int]) -> None:
    case, rng = make_case(0, (4, 17)), np.random.default_rng(1)
    clean = Tally.zero(MODEL, CPU)
    counted(clean, [(case, routing_of(case))], forced)
    assert not clean.repeated
    experts, expected = case.experts.copy(), 0
    for b, s, layer in np.argwhere(rng.random(experts.shape[:-1]) < 0.2):
        first, second = rng.choice(K, 2, replace=False)
        experts[b, s, layer, first] = experts[b, s, layer, second]
        expected += bool(case.recorded[b, s])
    tally = Tally.zero(MODEL, CPU)
    counted(tally, [(case, routing_of(replace(case, experts=experts)))], forced)
    assert int(tally.repeated) == expected > 0


def test_without_comparing_only_what_was_used_is_counted() -> None:
    case = make_case(0, (4, 17))
    tally = Tally.zero(MODEL, CPU)
    counted(tally, [(case, routing_of(case, compare=False))], range(LAYERS))
    expected = slow_counts(tally, case, range(LAYERS))
    for name in ("followed", "mismatched_ids"):
        np.testing.assert_array_equal(getattr(tally, name).numpy(), expected[name])
    assert not any(
        getattr(tally, name).any() for name in ("disagree", "loads", "overlap", "windows", "compared", "repeated")
    )
    assert not tally.differs
    tally.require_all_visited({layer: FIRST + layer for layer in range(LAYERS)}, 1)


def test_layers_that_do_not_follow_each_other_are_counted_apart() -> None:
    """As where one router takes no part, which the end of the pass finds."""
    case = make_case(0, (4, 17))
    tally = Tally.zero(MODEL, CPU)
    counted(tally, [(case, routing_of(case))], range(LAYERS), [(0, 1, 3, 4)])
    expected = slow_counts(tally, case, range(LAYERS))["disagree"]
    expected[[FIRST + 2, FIRST + 5]] = 0
    np.testing.assert_array_equal(tally.disagree.numpy(), expected)


@pytest.mark.parametrize("whole", [True, False])
def test_ids_are_widened_in_the_order_of_the_router(monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    case = make_case(0, (4, 17))
    experts = torch.from_numpy(case.experts.astype(np.uint16))
    if not whole:
        monkeypatch.setattr(routed, "WIDE_BYTES", 0)
    record = RoutedRecord(replace(routing_of(case), experts=experts))
    for layer in range(LAYERS):
        expected = router_order(torch.from_numpy(case.experts[:, :, layer])).long()
        assert torch.equal(record.ids(layer), expected)
        assert torch.equal(record.layers(layer, layer + 1)[0], expected)
    assert torch.equal(record.recorded, router_order(torch.from_numpy(case.recorded)))


@pytest.mark.parametrize("shape", [(3, 10), (1, 30), (5, 1), (2, 2)])
def test_audited_pairs_are_those_of_the_rows_rolled_by_a_lag(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    recorded, sampled = rng.random(shape) < 0.8, rng.random(shape) < 0.5
    windows = np.where(rng.random(shape) < 0.7, rng.integers(0, AUDIT_WINDOWS, shape), -1)
    order = np.arange(recorded.size).reshape(shape) + (rng.random(shape) < 0.2)
    found = audit_rows(recorded, order, windows, sampled)
    place = np.arange(recorded.size).reshape(shape[::-1]).T
    audited = recorded & (windows >= 0)
    for lag, own, record, parts in zip(LAGS, *parts_of(found), strict=True):
        valid = audited & np.roll(recorded, -lag, 1) & (np.roll(order, -lag, 1) == order + lag)
        np.testing.assert_array_equal(own, place[valid])
        np.testing.assert_array_equal(record, np.roll(place, -lag, 1)[valid])
        np.testing.assert_array_equal(parts, sampled[valid])
    np.testing.assert_array_equal(found.window, windows[audited])


@pytest.mark.usefixtures("single_rank")
def test_comparing_changes_neither_gradient_nor_what_was_used(model_dir: Path) -> None:
    policy = make_policy(model_dir)
    step, microbatches = prepare(policy, make_batch(policy.arch.spec), 5)
    old = step.rollout_logprobs.astype(np.float64)
    found = []
    for compare in (True, False):
        _, counts, _ = policy.accumulate(microbatches, step, old, None, RoutingUse(force=True, compare=compare))
        found.append((counts, gradients(policy)))
    (compared, first), (plain, second) = found
    assert_same(first, second)
    assert metrics.replay_health(plain) == metrics.replay_health(compared)
    assert plain.replayed == plain.required > 0
    assert compared.compared > 0
    assert (plain.compared, plain.disagree_any, int(plain.disagree.sum())) == (0, 0, 0)


@pytest.mark.parametrize("k", range(1, 10))
def test_flags_of_a_row_are_joined_whatever_their_number(k: int) -> None:
    flags = torch.rand(64, k, generator=torch.Generator().manual_seed(k)) < 0.5
    flags[0], flags[1] = True, False
    assert torch.equal(counting.any_of_row(flags), flags.any(-1))
    assert torch.equal(counting.all_of_row(flags), flags.all(-1))


def test_an_audit_or_a_trace_compares() -> None:
    for asked in ("audit", "trace"):
        with pytest.raises(ConfigError, match="leave compare=True"):
            RoutingUse(force=True, compare=False, **{asked: True})


class Operations(TorchDispatchMode):
    """Names of the operations that did more than take a view."""

    VIEWS = (
        "detach", "select", "unsqueeze", "squeeze", "slice", "view", "unbind", "permute", "transpose", "_unsafe_view",
        "expand", "split_with_sizes",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.VIEWS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("compare", [True, False])
@pytest.mark.parametrize("gap", [False, True])
def test_a_forced_router_call_is_a_few_operations(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, recompute: str, compare: bool, gap: bool
) -> None:
    """Megatron's own top-k is made of the rows that choose for themselves, and of the others when they are counted; the
    record is widened once, and what is counted for all layers does not grow.
    """
    policy = make_policy(model_dir, make_config(trainer={"recompute": recompute}))
    step, microbatches = prepare(policy, make_batch(policy.arch.spec), 12)
    if gap:
        recorded = microbatches[0].recorded & (np.arange(microbatches[0].recorded.shape[1]) != 2)
        microbatches = [replace(microbatches[0], recorded=recorded)]
    seen: dict[str, list[list[str]]] = {"get_replay_topk": [], "account": [], "count": []}
    for owner, name in ((replay._Visit, "get_replay_topk"), (replay._Visit, "account"), (PassCounts, "count")):
        method = getattr(owner, name)

        def watched(self: Any, *args: Any, method: Any = method, name: str = name) -> Any:
            with Operations() as operations:
                found = method(self, *args)
            seen[name].append(operations.seen)
            return found

        monkeypatch.setattr(owner, name, watched)
    old = step.rollout_logprobs.astype(np.float64)
    policy.accumulate(microbatches, step, old, None, RoutingUse(force=True, compare=compare))
    first, *others = seen["get_replay_topk"]
    # The rows that have a record are cloned where their layout is not the routers' order.
    forced = ["gather", *(["index_copy", "index_select", "topk"] if gap else [])]
    assert sorted({*first} - {"clone"}) == ["_to_copy", *forced]
    assert [sorted(one) for one in others[:3]] == [forced] * 3
    # Recomputation takes part in nothing but the forcing.
    assert len(others) == (3 if recompute == "none" else 7)
    assert sum(map(len, others[3:])) <= 4 * len(forced) + 2
    assert not any(seen["account"])
    # An update counts each microbatch, and has nothing left to count behind the last.
    count, rest = seen["count"]
    assert len(count) <= (33 if compare else 12)
    assert not rest
    if compare:
        policy.logprobs(microbatches, step, RoutingUse(force=True, audit=True))
        assert sum(map(len, [*seen["account"], seen["count"][-1]])) <= len(count) + 14
