"""A rank that holds only the blocks with its own layers reports and does what one that holds all of them does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from r3.config import Config
from r3.errors import RoutingError
from r3.trainer.model import Architecture
from r3.trainer.policy import Policy
from r3.trainer.worker import TrainerWorker
from r3.types import Batch, ModelSpec
from tests.gloo_pool import GlooPool, arranged
from tests.megatron.layouts import CP, EP, ETP1, PP, TP, VPP, layout_config
from tests.megatron.test_worker import REPEATED, repeating
from tests.megatron.toys import joined_worker, make_advantages, make_batch

pytestmark = pytest.mark.megatron
Found = tuple[tuple[int, ...], dict[str, float] | None]


def timeless(worker: TrainerWorker, batch: Batch) -> dict[str, float] | None:
    """The metrics of a step with a pass without replay, wall times left out; on rank 0."""
    result = worker.step(1, make_advantages(batch), True, batch)
    return result and {k: v for k, v in result.metrics.items() if not k.endswith(("_s", "per_s"))}


def step_of_rank(config: Config, directory: Path, batch: Batch, lacking: int = 0) -> Found:
    """Runs in every rank: its layers, and a step on the blocks that hold them, but `lacking` of them."""
    with arranged(config.trainer):
        worker = TrainerWorker(config, str(directory), dist.get_rank(), dist.get_world_size(), 10)
        worker.policy = Policy(config, Architecture.from_directory(directory), directory, updates=10)
        own = [block for block in batch.blocks if not set(worker.layers).isdisjoint(block.layers)]
        return worker.layers, timeless(worker, replace(batch, blocks=tuple(own[lacking:])))


@pytest.mark.parametrize(
    ("layout", "layers"),
    [(PP, [(0, 1), (2, 3)]), (VPP, [(0, 2), (1, 3)]), (TP, [(0, 1, 2, 3)] * 2), (TP | EP | ETP1, [(0, 1, 2, 3)] * 2)],
    ids=["pp2", "pp2+vpp2", "tp2", "tp2+ep2"],
)
@pytest.mark.parametrize("size", [1, 3])
def test_own_blocks_are_enough(
    gloo_pool: GlooPool, model_dir: Path, layout: dict[str, Any], layers: list[tuple[int, ...]], size: int
) -> None:
    samples = make_batch(ModelSpec.from_directory(model_dir)).trajectories()
    with joined_worker(layout_config({}, 1), model_dir) as worker:
        expected = timeless(worker, Batch.pack(samples))
    assert expected is not None
    found: list[Found] = gloo_pool.run(step_of_rank, layout_config(layout, 2), model_dir, Batch.pack(samples, size))
    assert [of for of, _ in found] == layers
    metrics = found[0][1]
    assert metrics is not None
    assert metrics.keys() == expected.keys()
    # Pads and the pairs of neighbouring rows on one rank depend on the layout; everything else does not.
    for key in expected.keys() - {"router/pad_rows", "router/native_rows"}:
        if key.startswith("router/lag_margin"):
            continue
        assert metrics[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key


def test_a_rank_without_one_of_its_blocks_refuses_the_step(gloo_pool: GlooPool, model_dir: Path) -> None:
    batch = Batch.pack(make_batch(ModelSpec.from_directory(model_dir)).trajectories(), 1)
    with pytest.raises(RuntimeError, match=f"{RoutingError.__name__}.*lack MoE layers"):
        gloo_pool.run(step_of_rank, layout_config(TP, 2), model_dir, batch, 1)


@pytest.mark.parametrize(
    ("layout", "layer"), [(PP, 1), (PP, 2), (TP, 1), (CP, 1)], ids=["pp2, first", "pp2, last", "tp2", "cp2"]
)
def test_a_rank_that_holds_a_row_that_repeats_an_expert_names_it(
    gloo_pool: GlooPool, model_dir: Path, layout: dict[str, Any], layer: int
) -> None:
    spec = ModelSpec.from_directory(model_dir)
    batch = repeating(make_batch(spec), spec, sample=5, layer=layer)
    with pytest.raises(RuntimeError, match=REPEATED.format(layer)) as failed:
        gloo_pool.run(step_of_rank, layout_config(layout, 2), model_dir, batch)
    assert str(failed.value).count("1 recorded (row, layer) pairs on this rank") <= 1, "the other cannot name it"
