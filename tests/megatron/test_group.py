"""The driver's handle: two real ranks as Ray actors, and what comes out when one of them fails."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import ray

from r3.errors import ConfigError, EngineError, RoutingError
from r3.metrics import load_metrics
from r3.trainer.group import TrainerGroup
from r3.transport import BatchRef
from r3.types import Batch, ModelSpec
from r3.weights import WeightBuckets
from tests.expert_loads import expert_loads
from tests.megatron.toys import joined_worker, make_advantages, make_batch, make_config

pytestmark = [pytest.mark.megatron, pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def is_weights(weights: object) -> tuple[bool, int, int]:
    assert isinstance(weights, WeightBuckets)
    return True, weights.version, weights.nbytes


def test_two_ranks_train_and_errors_keep_their_type(model_dir: Path, tmp_path: Path) -> None:
    spec = ModelSpec.from_directory(model_dir)
    batch = make_batch(spec)
    refs = [BatchRef.put(batch)]
    with TrainerGroup(make_config(trainer={"processes": 2}), model_dir) as group:
        assert group.spec() == spec
        assert group.versions()["device"] == "cpu"
        frozen, walked = ray.get(
            group._ranks[1].__ray_call__.remote(lambda _: (gc.get_freeze_count(), len(gc.get_objects())))
        )
        assert frozen > 10 * walked, "the collector walks through modules and model in a step"
        assert group.audit(refs)["router/coverage"] == 1
        result = group.step(1, make_advantages(batch), True, refs)
        assert (result.step, result.weight_version) == (1, 1)
        assert result.metrics["router/coverage"] == 1
        assert {alarm.rule for alarm in result.alarms} == {"overlap"}, "the records are random"
        assert result.metrics["transport/node_copies"] == 1, "the ranks hold copies of their own"
        assert result.metrics["transport/get_s"] > 0
        _, version, size = ray.get(ray.remote(is_weights).remote(group.export().ref))
        assert version == 1
        assert size > 100_000
        group.save_hf(tmp_path / "hf")
        assert ModelSpec.from_directory(tmp_path / "hf") == spec
        with pytest.raises(RoutingError, match="advantages"):
            group.step(2, np.zeros(1, np.float32), False, refs)
        pid = ray.get(group._ranks[1].__ray_call__.remote(lambda _: os.getpid()))
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="trainer rank 1 died in 'step'"):
            group.step(2, make_advantages(batch), False, refs)


def test_a_pipeline_stage_fetches_its_own_layers_and_the_step_is_the_same(model_dir: Path) -> None:
    spec = ModelSpec.from_directory(model_dir)
    samples = make_batch(spec).trajectories()
    whole, halves, uneven = (Batch.pack(samples, size) for size in (4, 2, 3))
    row = sum(len(t.tokens) - 1 for t in samples) * spec.top_k

    def timeless(found: Mapping[str, float]) -> dict[str, float]:
        return {k: v for k, v in found.items() if not k.endswith(("_s", "per_s"))}

    with joined_worker(make_config(), model_dir) as worker:
        alone = worker.step(1, make_advantages(whole), True, whole)
        assert alone is not None
        assert worker.layers == (0, 1, 2, 3)
    trainer = {"processes": 2, "pipeline_parallel": 2}
    with TrainerGroup(make_config(trainer=trainer), model_dir) as group:
        first = {}
        for batch, layers in (
            (whole, [[range(4)]] * 2),
            (halves, [[(0, 1)], [(2, 3)]]),
            (uneven, [[range(3)], [range(3), (3,)]]),
        ):
            (report, *fetched), *others = group._all("audit", [BatchRef.put(batch)])
            got = [*fetched, *(other for _, other in others)]
            assert [[block.layers for block in rank.blocks] for rank in got] == [
                [tuple(b) for b in of] for of in layers
            ]
            assert [[block.nbytes for block in rank.blocks] for rank in got] == [
                [row * len(b) for b in of] for of in layers
            ]
            first = first or report
            assert report == first, "the blocks change what is computed"
        found = group.step(1, make_advantages(whole), True, [BatchRef.put(halves)]).metrics
        outlet = group.outlet()
        assert outlet.open(shared=False) == 1
        part = outlet.fill(-1, 0).wait()
        assert part.last
        names = {slot.name for slot in part.slots}
        assert {"model.embed_tokens.weight", "model.layers.3.mlp.gate.weight", "lm_head.weight"} <= names
        assert outlet.close().nbytes == part.nbytes > 900_000
    assert found["transport/node_copies"] == 1
    expected = timeless(alone.metrics)
    assert timeless(found).keys() - expected.keys() == {"transport/node_copies"}
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    experts = np.concatenate([t.routing.experts for t in samples if t.routing])
    assert (
        found["router/load_max_over_mean"]
        == load_metrics(expert_loads(experts, spec.num_experts), spec.top_k)["router/load_max_over_mean"]
    )


def test_the_driver_needs_no_torch() -> None:
    code = "import sys, r3.trainer.group; assert not {'torch', 'megatron', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_model_that_is_not_supported_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        TrainerGroup(make_config(), tmp_path)


def test_a_start_that_takes_too_long_names_the_rank(model_dir: Path) -> None:
    with pytest.raises(EngineError, match="trainer rank 0 did not finish 'start' in time"):
        TrainerGroup(make_config(trainer={"start_timeout_s": 0.01}), model_dir)
