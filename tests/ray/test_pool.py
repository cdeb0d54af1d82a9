"""The rollout pool over real Ray actors with an engine without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3.config import Config
from r3.errors import ConfigError, EngineError, RoutingError
from r3.rollout.deaths import WorkerDied
from r3.rollout.pool import RolloutPool
from r3.types import Batch, Prompt
from r3.weights import WeightBuckets

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

MakeConfig = Callable[..., Config]
PROMPTS = tuple(Prompt(i, f"prompt number {i}", str(i)) for i in range(8))
# Ray sends a smaller return value to the caller inline, instead of leaving it in the object store.
INLINE_LIMIT = 100 * 1024


class Events(list[tuple[str, dict[str, Any]]]):
    """Collects what the pool reports."""

    def __call__(self, kind: str, **facts: Any) -> None:
        self.append((kind, facts))

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self]


@pytest.fixture(scope="module")
def healthy(ray_session: None, make_config: MakeConfig, model_dir: Path) -> Iterator[tuple[RolloutPool, Events]]:
    """A pool of two workers without faults, shared by the tests that leave it so, and what it reports."""
    events = Events()
    with RolloutPool(make_config(workers=2, max_new_tokens=64), model_dir, events) as pool:
        yield pool, events


def fetched(rollout_batches: tuple[Any, ...]) -> list[Batch]:
    return [batch.get() for batch in rollout_batches]


def test_facts_follow_the_batches_of_all_workers(healthy: tuple[RolloutPool, Events]) -> None:
    pool, _ = healthy
    rollout = pool.generate(PROMPTS[:5], 1)
    evaluated = pool.evaluate(PROMPTS)

    batches = fetched(rollout.batches)
    assert [len(batch) for batch in batches] == [6, 9]
    assert [fact for batch in batches for fact in batch.facts()] == list(rollout.facts)
    assert [(f.group, f.member) for f in rollout.facts] == [(g, m) for g in range(5) for m in range(3)]
    assert rollout.rewards.tolist() == [1000 * f.group + f.response_tokens for f in rollout.facts]
    assert rollout.groups.tolist() == [f.group for f in rollout.facts]
    assert evaluated == [1000 * prompt.index + 2 for prompt in PROMPTS]
    assert rollout.response_tokens == sum(f.response_tokens for f in rollout.facts)
    assert rollout.routing_bytes == sum(batch.routing_bytes for batch in batches)


def test_a_real_batch_stays_in_the_object_store_and_is_read_without_a_copy(
    healthy: tuple[RolloutPool, Events],
) -> None:
    pool, _ = healthy
    rollout = pool.generate(tuple(Prompt(i, f"{'x' * 200}{i}", "") for i in range(64)), 1)
    batch, again = rollout.batches[0].get(), rollout.batches[0].get()

    assert batch.routing_bytes > INLINE_LIMIT

    def arrays(one: Batch) -> list[np.ndarray]:
        return [one.tokens, one.logprobs, *one.blocks[0].stored]

    assert len(arrays(batch)) == 2 + len(batch), "an array of each trajectory's rows"
    for i, (array, other) in enumerate(zip(arrays(batch), arrays(again), strict=True)):
        assert not array.flags.writeable
        assert not array.flags.owndata
        assert array.ctypes.data == other.ctypes.data, f"array {i} was copied out of shared memory"
    routing = batch.trajectory(0).routing  # the first of its group has all of its rows for itself
    assert np.shares_memory(routing.experts, batch.blocks[0].rows[0])
    routing.verify(batch.trajectory(0).tokens)


@pytest.mark.parametrize(("capture", "layers"), [(True, [(0, 1, 2), (3,)]), (False, [])])
def test_core_and_blocks_are_objects_of_their_own(
    make_config: MakeConfig, model_dir: Path, capture: bool, layers: list[tuple[int, ...]]
) -> None:
    import ray

    config = make_config(block_layers=3).model_dump()
    config["routing"]["capture"], config["replay"]["mode"] = capture, "r3" if capture else "none"
    with RolloutPool(Config.model_validate(config), model_dir) as pool:
        rollout, canary = pool.generate(PROMPTS, 1), pool.canary(PROMPTS) if capture else None
        for handle in (*rollout.batches, *([canary] if canary else [])):
            assert [block.layers for block in handle.blocks] == layers
            assert ray.get(handle.core).blocks == ()
            assert [ray.get(block.ref).layers for block in handle.blocks] == layers
            assert all((t.routing is not None) == capture for t in handle.get().trajectories())
    assert (rollout.routing_bytes > 0) == capture


def test_dropped_samples_are_reported_once_per_step(make_config: MakeConfig, model_dir: Path) -> None:
    events = Events()
    with RolloutPool(make_config({"bad_every": 5}, on_error="drop_sample", workers=2), model_dir, events) as pool:
        rollout = pool.generate(PROMPTS, 9)

    assert rollout.dropped == 6  # 0, 5, 10 of the 12 requests of each worker
    assert len(rollout.facts) == 18
    assert events == [("samples_dropped", {"step": 9, "count": 6, "first": events[0][1]["first"]})]
    assert "made-up defect" in events[0][1]["first"]


def test_samples_trained_natively_are_reported_beside_dropped_ones(make_config: MakeConfig, model_dir: Path) -> None:
    events = Events()
    config = make_config({"missing_every": 5, "abort_every": 4}, on_missing="native_sample", workers=2)
    with RolloutPool(config, model_dir, events) as pool:
        rollout = pool.generate(PROMPTS, 9)

    # Of the 12 requests of each worker 0, 5, 10 lack a record; 4 and 8 are aborted.
    assert [(s.group, s.member) for s in rollout.native_samples] == [(0, 0), (1, 2), (3, 1), (4, 0), (5, 2), (7, 1)]
    assert (rollout.dropped, len(rollout.facts)) == (4, 20)
    assert [(kind, facts["count"]) for kind, facts in events] == [("samples_dropped", 4), ("samples_native", 6)]
    records = [t.routing for batch in fetched(rollout.batches) for t in batch.trajectories()]
    assert sum(record is None for record in records) == 6


def test_records_that_found_no_room_in_shared_memory_are_an_event(make_config: MakeConfig, model_dir: Path) -> None:
    events = Events()
    with RolloutPool(make_config({"unshared_every": 6}, workers=2), model_dir, events) as pool:
        assert pool.describe_engines() == ["2 x fake 1, provenance unknown (made up); rows come through shared memory"]
        pool.generate(PROMPTS, 9)
    assert events == [("rows_not_shared", {"step": 9, "count": 4, "fix": "raise routing.shared_mib (now 256)"})]


def test_a_step_without_a_usable_sample_stops_the_run(make_config: MakeConfig, model_dir: Path) -> None:
    with (
        RolloutPool(make_config({"abort_every": 1}), model_dir) as pool,
        pytest.raises(EngineError, match="step 2: none of 24 samples is usable; first: aborted"),
    ):
        pool.generate(PROMPTS, 2)


def test_a_dead_worker_is_replaced_with_the_current_weights_and_its_share_made_again(
    make_config: MakeConfig, model_dir: Path, tmp_path: Path
) -> None:
    import ray

    events = Events()
    faults = {"die_in": "generate", "die_once": str(tmp_path / "died")}
    with RolloutPool(make_config(faults, workers=2), model_dir, events) as pool:
        pool.load_weights(ray.put(WeightBuckets(version=4, buckets=())))
        rollout = pool.generate(PROMPTS, 1)

    assert events.kinds() == ["rollout_worker_died", "rollout_worker_replaced"]
    assert events[0][1]["failures"] == 1
    assert [(f.group, f.member) for f in rollout.facts] == [(g, m) for g in range(8) for m in range(3)]
    assert {f.weight_version for f in rollout.facts} == {4}


@pytest.mark.slow
def test_a_death_is_seen_at_once_whoever_waits_for_the_dead_worker(make_config: MakeConfig, model_dir: Path) -> None:
    events = Events()
    faults = {"die_in": "load_weights", "die_index": 1, "hang_in": "load_weights", "hang_index": 0}
    with RolloutPool(make_config(faults, workers=3, timeout_s=30, max_failures=1), model_dir, events) as pool:
        weights = WeightBuckets(version=4, buckets=())
        with pytest.raises(WorkerDied, match="rollout worker 1 died") as caught:
            pool.call("load_weights", dict.fromkeys(range(3), (weights,)))
        death = caught.value
        assert (death.worker, death.returned) == (1, {2})
        death.blocked = (0,)
        pool.replace(death)
        assert len(pool.generate(PROMPTS, 1).facts) == 24
    assert [(kind, facts["worker"]) for kind, facts in events] == [
        ("rollout_worker_blocked", 0), ("rollout_worker_died", 1),
        ("rollout_worker_replaced", 1), ("rollout_worker_replaced", 0),
    ]  # fmt: skip


def test_all_workers_that_hang_in_a_call_are_named(make_config: MakeConfig, model_dir: Path) -> None:
    config = make_config({"hang_in": "load_weights"}, workers=2, timeout_s=0.5)
    weights = WeightBuckets(version=4, buckets=())
    with (
        RolloutPool(config, model_dir) as pool,
        pytest.raises(EngineError, match=r"worker 0, 1 did not answer `load_weights` within 0.5 s"),
    ):
        pool.call("load_weights", dict.fromkeys(range(2), (weights,)))


def test_what_a_replacement_says_of_itself_is_taken_and_told(
    make_config: MakeConfig, model_dir: Path, tmp_path: Path
) -> None:
    events, died = Events(), str(tmp_path / "died")
    with RolloutPool(
        make_config({"die_in": "generate", "die_once": died, "changed_by": died}), model_dir, events
    ) as pool:
        pool.generate(PROMPTS, 1)
        assert pool.spec().unverified == "changed"
        rows = pool.spec().describe_rows()
    assert events[1] == ("rollout_worker_changed", {"worker": 0, "rows": rows, "unverified": "changed"})
    assert events.kinds() == ["rollout_worker_died", "rollout_worker_changed", "rollout_worker_replaced"]


def test_a_batch_outlives_the_worker_that_made_it(make_config: MakeConfig, model_dir: Path) -> None:
    with RolloutPool(make_config(max_new_tokens=64), model_dir) as pool:
        rollout = pool.generate(tuple(Prompt(i, f"{'x' * 200}{i}", "") for i in range(64)), 1)

    (batch,) = fetched(rollout.batches)
    assert batch.facts() == rollout.facts


def test_workers_that_keep_dying_end_the_run(make_config: MakeConfig, model_dir: Path) -> None:
    events = Events()
    config = make_config({"die_in": "evaluate", "die_index": 0}, max_failures=1)
    with (
        RolloutPool(config, model_dir, events) as pool,
        pytest.raises(EngineError, match=r"worker 0 died .*death 2 of this run, rollout.max_failures is 1"),
    ):
        pool.evaluate(PROMPTS)
    assert events.kinds() == ["rollout_worker_died", "rollout_worker_replaced", "rollout_worker_died"]


def test_a_dead_maker_of_weights_is_not_taken_for_a_dead_worker(make_config: MakeConfig, model_dir: Path) -> None:
    import ray

    class Trainer:
        def export(self) -> WeightBuckets:
            import os

            os._exit(1)

    events = Events()
    with RolloutPool(make_config(), model_dir, events) as pool:
        weights = ray.remote(Trainer).options(num_cpus=0).remote().export.remote()
        with pytest.raises(EngineError, match="`load_weights` got an argument whose maker has died"):
            pool.load_weights(weights)
    assert events == []


def test_a_worker_that_hangs_is_named_with_its_limit(make_config: MakeConfig, model_dir: Path) -> None:
    with (
        RolloutPool(make_config({"hang_in": "generate"}, timeout_s=0.5), model_dir) as pool,
        pytest.raises(EngineError, match=r"worker 0 did not answer `generate` within 0.5 s \(rollout.timeout_s\)"),
    ):
        pool.generate(PROMPTS, 1)


def test_an_engine_that_does_not_start_in_time_is_named(make_config: MakeConfig, model_dir: Path) -> None:
    with pytest.raises(EngineError, match=r"worker 0 did not start within 1 s \(rollout.start_timeout_s\)"):
        RolloutPool(make_config({"hang_in": "start"}, start_timeout_s=1), model_dir)


def test_an_engine_that_dies_at_start_is_an_engine_error(make_config: MakeConfig, model_dir: Path) -> None:
    with pytest.raises(EngineError, match="died while it started"):
        RolloutPool(make_config({"die_in": "start", "die_index": 0}), model_dir)


def test_errors_of_the_worker_keep_their_type_and_text(make_config: MakeConfig, model_dir: Path) -> None:
    with pytest.raises(EngineError, match=r"^no kernel for this device$"):
        RolloutPool(make_config({"refuse_start": "no kernel for this device"}), model_dir)
    with pytest.raises(ConfigError, match="'tgi' is unknown"):
        RolloutPool(make_config(engine="tgi"), model_dir)
    with (
        RolloutPool(make_config({"bad_every": 7}), model_dir) as pool,
        pytest.raises(RoutingError, match="made-up defect"),
    ):
        pool.generate(PROMPTS, 1)


def test_the_canary_runs_on_every_worker(healthy: tuple[RolloutPool, Events]) -> None:
    pool, events = healthy
    (batch,) = fetched((pool.canary(PROMPTS),))

    assert [(kind, facts["worker"]) for kind, facts in events] == [("rollout_canary", 0), ("rollout_canary", 1)]
    assert len(batch) == 8
