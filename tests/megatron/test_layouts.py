"""Every layout replays every id and gives the single process's loss, log-probs, gradients and next weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from r3.config import Config
from r3.trainer import parallel
from r3.trainer.outcome import Rehearsal, worst_difference
from r3.types import Batch, ModelSpec
from tests.expert_loads import expert_loads
from tests.gloo_pool import GlooPool
from tests.megatron.layouts import (
    LARGE_LAYOUTS,
    LAYOUTS,
    layout_config,
    resumed,
    run_layout,
    run_mutated,
    step_of_layout,
)
from tests.megatron.toys import make_batch, make_config

pytestmark = pytest.mark.megatron
R2 = {"counterfactual_r2": True}
FORMS = {"packed": True, "padded": False}


@pytest.fixture(scope="module")
def batch(model_dir: Path) -> Batch:
    return make_batch(ModelSpec.from_directory(model_dir), groups=4, members=2)


@pytest.fixture(scope="module")
def expected(model_dir: Path, batch: Batch) -> Rehearsal:
    """The single process, padded, all samples in one microbatch, nothing recomputed."""
    parallel.join(dist.HashStore(), 0, 1, seed=0, timeout_s=60)
    try:
        config = make_config(trainer={"packed": False, "micro_batch_size": 64})
        return run_layout(config, model_dir, batch)
    finally:
        parallel.leave()


@pytest.fixture(scope="module")
def large_pool() -> Iterator[GlooPool]:
    with GlooPool(4) as pool:
        yield pool


def assert_equal(found: Rehearsal, expected: Rehearsal, batch: Batch, config: Config) -> None:
    counts = found.counts
    rows = batch.stored.rows
    assert (counts.mismatched_ids, counts.missing) == (0, 0)
    assert counts.replayed == counts.required == counts.compared == rows
    assert counts.native == len(batch), "only last tokens route on their own"
    np.testing.assert_array_equal(counts.disagree, expected.counts.disagree)
    records = np.concatenate([t.routing.experts for t in batch.trajectories() if t.routing])
    np.testing.assert_array_equal(counts.loads, expert_loads(records, counts.loads.shape[1]))
    np.testing.assert_array_equal(found.differs, expected.differs)
    assert counts.disagree_any == expected.counts.disagree_any
    assert found.loss == pytest.approx(expected.loss, abs=1e-6)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5, rtol=0)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5), "clipping would scale by another norm"
    if config.trainer.distributed_optimizer:
        # A rank holds only its reduced shard of the gradient, so the weights behind the update are compared.
        off = np.concatenate([np.abs(found.weights[n] - w).reshape(-1) > 2e-5 for n, w in expected.weights.items()])
        # AdamW turns a gradient that is all rounding error into a full step of either sign.
        assert off.mean() < 1e-3
        return
    worst, name = worst_difference(found.gradients, expected.gradients)
    assert worst <= 1e-5, name


# Every pair of a layout with a form and with a recompute; the other half of the triples takes a minute and a half.
@pytest.mark.parametrize(
    ("recompute", "form"),
    [
        ("none", "packed"),
        ("full", "padded"),
        pytest.param("none", "padded", marks=pytest.mark.slow),
        pytest.param("full", "packed", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_equal_one(
    gloo_pool: GlooPool, model_dir: Path, batch: Batch, expected: Rehearsal, layout: str, recompute: str, form: str
) -> None:
    config = layout_config(LAYOUTS[layout], 2, trainer={"packed": FORMS[form], "recompute": recompute})
    found: Any = gloo_pool.run(run_layout, config, model_dir, batch)[0]
    assert_equal(found, expected, batch, config)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("layout", LARGE_LAYOUTS)
def test_four_processes_equal_one(
    large_pool: GlooPool, model_dir: Path, batch: Batch, expected: Rehearsal, layout: str, recompute: str, form: str
) -> None:
    config = layout_config(LARGE_LAYOUTS[layout], 4, trainer={"packed": FORMS[form], "recompute": recompute})
    found: Any = large_pool.run(run_layout, config, model_dir, batch)[0]
    assert_equal(found, expected, batch, config)


@pytest.mark.parametrize("layout", ["tp2+ep2", "pp2+vpp2", "cp2"])
def test_a_step_reports_what_one_process_reports(
    gloo_pool: GlooPool, model_dir: Path, batch: Batch, layout: str
) -> None:
    parallel.join(dist.HashStore(), 0, 1, seed=0, timeout_s=60)
    try:
        expected = step_of_layout(make_config(metrics=R2), model_dir, batch)
    finally:
        parallel.leave()
    config = layout_config(LAYOUTS[layout], 2, metrics=R2)
    found, nothing = gloo_pool.run(step_of_layout, config, model_dir, batch)
    assert nothing is None
    assert {"mismatch/k3", "mismatch_native/k3", "mismatch_r2/k3", "router/dead_experts"} <= found.keys()
    assert found.keys() == expected.keys()
    for key in expected.keys() - {"router/pad_rows", "router/native_rows"}:
        # Lag overlaps leave out the pairs of rows that a cut takes apart.
        near = 0.05 if key.startswith(("router/lag", "router/overlap")) else 1e-6
        assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=near), key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["dp2 distributed optimizer", "tp2+ep2", "pp2+vpp2"])
def test_a_resumed_rank_goes_on_to_the_bit(
    gloo_pool: GlooPool, model_dir: Path, batch: Batch, tmp_path: Path, layout: str, dtype: str
) -> None:
    config = layout_config(LAYOUTS[layout], 2, trainer={"dtype": dtype})
    for whole, found in gloo_pool.run(resumed, config, model_dir, batch, tmp_path):
        assert len(whole) > 20
        for name, value in whole.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("layout", "mutation", "loss_moves"),
    [
        ("pp2", "no record in recompute", False),
        ("pp2", "a stale microbatch in recompute", False),
        ("pp2", "two layers swapped", True),
        ("tp2", "two layers swapped", True),
        ("cp2", "no zigzag", True),
    ],
)
def test_mutations_are_noticed(
    gloo_pool: GlooPool,
    model_dir: Path,
    batch: Batch,
    expected: Rehearsal,
    layout: str,
    mutation: str,
    loss_moves: bool,
) -> None:
    """The comparison above can fail, and for recompute only because gradients are compared."""
    trainer = {"packed": False, "recompute": "full", "micro_batch_size": 2}
    if mutation.startswith("a stale"):
        # Equal shapes, so that one microbatch's record fits another.
        trainer["dispatcher"] = "allgather"
    config = layout_config(LAYOUTS[layout], 2, trainer=trainer)
    found: Any = gloo_pool.run(run_mutated, config, model_dir, batch, mutation)[0]
    assert (abs(found.loss - expected.loss) > 1e-6) == loss_moves
    assert worst_difference(found.gradients, expected.gradients)[0] > 1e-2
