"""The walk over a model's shards: the same bytes and order as one process, few collectives, two batches of memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef

from r3.config import Config
from r3.trainer.build import build_chunks, build_layout
from r3.trainer.convert import WeightExport
from r3.trainer.gather import LIVE, Plan, Shard, ShardGather
from r3.trainer.model import Architecture
from r3.trainer.stream import BucketStream
from r3.weights import SentWeights
from tests.gloo_pool import GlooPool, arranged
from tests.megatron.layouts import EP, ETP1, PP, TP, VPP, layout_config, worker_in
from tests.megatron.toys import make_config, write_model

pytestmark = pytest.mark.megatron

BATCH = 30_000
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": TP,
    "ep2": EP,
    "ep2, grouped experts": EP | {"experts": "grouped"},
    "pp2": PP,
    "pp2+vpp2": VPP,
    "tp2+ep2": TP | EP | ETP1,
    "etp2, grouped experts": TP | {"expert_tensor_parallel": 2, "experts": "grouped"},
}
METADATA = ["all_gather_object", "all_reduce"]
# Whatever of torch.distributed a walk might call; isend and irecv are what a batch consists of.
CALLS = (
    "batch_isend_irecv", "send", "recv", "all_gather_object", "gather_object", "all_gather", "gather", "all_reduce",
    "broadcast", "barrier", "send_object_list", "recv_object_list",
)  # fmt: skip


@contextmanager
def counted() -> Iterator[list[str]]:
    """Collect the names of the calls of torch.distributed."""
    calls: list[str] = []

    def noting(name: str, function: Any) -> Any:
        def noted(*arguments: Any, **keywords: Any) -> Any:
            calls.append(name)
            return function(*arguments, **keywords)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(dist, name, noting(name, getattr(dist, name)))
        yield calls


@contextmanager
def weighed() -> Iterator[list[int]]:
    """Collect, at every batch that is made, the bytes of all batches that some tensor keeps alive."""
    made: list[tuple[StorageWeakRef, int]] = []
    held: list[int] = []
    flat = ShardGather._flat

    def watched(gather: ShardGather, nbytes: int) -> torch.Tensor:
        found = flat(gather, nbytes)
        storage = found.untyped_storage()
        made.append((StorageWeakRef(storage), storage.nbytes()))
        held.append(sum(size for ref, size in made if not ref.expired()))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardGather, "_flat", watched)
        yield held


def exporter(config: Config, directory: Path) -> WeightExport:
    arch = Architecture.from_directory(directory)
    chunks = build_chunks(config, arch, build_layout(config, arch), directory, replay=True)
    return WeightExport(chunks, arch, batch_bytes=BATCH)


@dataclass(frozen=True)
class Walked:
    """Two walks, the second into buckets, as one rank saw them; `own`: names of what it holds, in its order."""

    tensors: dict[str, Any]
    own: list[str]
    plan: Plan
    first: list[str]
    second: list[str]
    held: int
    extra: int


def walked(config: Config, directory: Path) -> Walked:
    with arranged(config.trainer):
        with counted() as first, weighed() as held:
            export = exporter(config, directory)
            assert not first
            assert export.extra_bytes == 0
            tensors = {name: tensor.numpy().copy() for name, tensor in export}
        with counted() as second, weighed() as held_again:
            BucketStream(iter(export), torch.float32, 100_000, torch.device("cpu")).drain()
        plan = export._gather._plan
        assert plan is not None
        own = [name for weight in export._held.values() for name in weight.sources]
        return Walked(tensors, own, plan, first, second, max(held + held_again, default=0), export.extra_bytes)


@pytest.fixture(scope="module")
def alone(model_dir: Path) -> Walked:
    with GlooPool(1) as one:
        found: Walked = one.run(walked, make_config(), model_dir)[0]
    return found


def test_one_process_copies_nothing(model_dir: Path, alone: Walked, single_rank: None) -> None:
    assert (alone.first, alone.second, alone.extra) == ([], [], 0)
    export = exporter(make_config(), model_dir)
    stored = {weight.parameter.untyped_storage().data_ptr() for weight in export._held.values()}
    shared = {name for name, tensor in export if tensor.untyped_storage().data_ptr() in stored}
    # Megatron stacks queries, keys and values in another order, so that these are copied.
    assert set(alone.tensors) - shared == {name for name in alone.tensors if re.search("[qkv]_proj", name)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_give_the_bytes_and_the_order_of_before(
    gloo_pool: GlooPool, model_dir: Path, alone: Walked, layout: str
) -> None:
    zero, one = gloo_pool.run(walked, layout_config(LAYOUTS[layout], 2), model_dir)
    assert one.tensors == {}
    assert list(zero.tensors) == list(dict.fromkeys([*zero.own, *one.own]))
    assert zero.tensors.keys() == alone.tensors.keys()
    for name, tensor in alone.tensors.items():
        np.testing.assert_array_equal(zero.tensors[name], tensor, err_msg=name)

    # Calls: the ranks agree once, then a call a batch, and two batches in a row are more than the limit.
    travel = sum(batch.nbytes for batch in zero.plan.batches)
    assert (travel > 0) == (layout != "dp2")
    batches = sum(bool(batch.spans) for batch in zero.plan.batches)
    assert batches <= 2 * travel / BATCH + 1
    assert batches < len(zero.tensors) / 4
    for rank in (zero, one):
        assert rank.first == METADATA[: 1 + bool(travel)] + ["batch_isend_irecv"] * batches
        assert rank.second == ["batch_isend_irecv"] * batches

    # Memory: two batches, each of which is larger than the limit only where one tensor is.
    for batch in zero.plan.batches:
        assert batch.nbytes <= BATCH or len({name for name, _ in batch.places}) == 1
    assert zero.held <= zero.extra <= LIVE * max(BATCH, 4 * 320 * 64)
    assert one.held <= zero.extra
    assert zero.plan == one.plan


def test_tied_embeddings_and_bfloat16(gloo_pool: GlooPool, tmp_path: Path) -> None:
    directory = write_model(tmp_path / "tied", tie_word_embeddings=True)
    config = layout_config(PP | {"dtype": "bfloat16"}, 2)
    found = gloo_pool.run(in_bfloat16, config, directory)[0]
    stored = load_file(directory / "model.safetensors")
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name].to(torch.bfloat16)) for name in stored)


def in_bfloat16(config: Config, directory: Path) -> dict[str, torch.Tensor]:
    with arranged(config.trainer):
        return {name: tensor.clone() for name, tensor in exporter(config, directory)}


def streamed(config: Config, directory: Path) -> tuple[list[str], SentWeights, int] | None:
    """Give up one stream behind its first bucket, then take another one whole; return its names and what was sent."""
    with arranged(config.trainer):
        worker = worker_in(config, directory)
        # Many batches a bucket, some of which are under way when the stream ends.
        worker.policy.export = WeightExport(worker.policy.chunks, worker.policy.arch, batch_bytes=BATCH)
        outlet = worker.outlet()
        if dist.get_rank():
            outlet.send_parts()
            outlet.send_parts()
            return None
        outlet.open(shared=False)
        assert not outlet.fill(-1, 0).last
        outlet.abandon(0, ())
        outlet.open(shared=False)
        parts = [outlet.fill(-1, 0)]
        while not parts[-1].last:
            parts.append(outlet.fill(parts[-1].number, 0))
        names = [slot.name for part in parts for slot in part.slots]
        return names, outlet.close(), worker.policy.export.extra_bytes


def test_a_stream_after_one_that_was_given_up_is_whole(gloo_pool: GlooPool, model_dir: Path, alone: Walked) -> None:
    config = layout_config(TP, 2, weights={"bucket_mib": 1}, rollout={"dtype": "float32"})
    (names, sent, gathering), _ = gloo_pool.run(streamed, config, model_dir)
    assert names == list(alone.tensors)
    assert sent.nbytes == sum(tensor.nbytes for tensor in alone.tensors.values())
    assert gathering > BATCH
    assert sent.extra_bytes == 2**20 + gathering, "one bucket at a time, and what the walk holds"


def failing(config: Config, directory: Path) -> str:
    """Let rank 1 fail behind its first batch; return the error of each rank."""
    from tests import gloo_pool

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gloo_pool, "COLLECTIVE_TIMEOUT_S", 2.0)
        with arranged(config.trainer):
            export, sent = exporter(config, directory), []

            def local(name: str, part: int) -> torch.Tensor:
                sent.append(name)
                if dist.get_rank() and len(sent) > 40:
                    raise ValueError(f"{name} is broken")
                return WeightExport._local(export, name, part)

            patch.setattr(export, "_local", local)
            try:
                for _ in export:
                    pass
            except (RuntimeError, ValueError) as error:
                return f"{type(error).__name__}: {error}"
            finally:
                # Rank 1 stays until rank 0 has run into the limit: a connection that closes would end the wait too.
                store = gloo_pool._shared[0]
                store.set("rank 0 is done", "") if not dist.get_rank() else store.wait(["rank 0 is done"])
    return ""


def test_a_rank_that_fails_leaves_rank_0_waiting_no_longer_than_the_limit(gloo_pool: GlooPool, model_dir: Path) -> None:
    zero, one = gloo_pool.run(failing, layout_config(TP, 2), model_dir)
    assert re.match("RuntimeError: .*[Tt]imed out waiting 2000ms for recv", zero), zero
    assert one.startswith("ValueError: decoder.layers.")


def test_a_plan_cuts_at_the_limit_and_leaves_a_large_tensor_whole() -> None:
    def shard(name: str, rows: int, part: int = 0, parts: int = 1) -> Shard:
        return Shard(name, part, parts, (rows,), torch.uint8)

    zero = [shard("own", 1000), shard("half", 20, 0, 2)]
    one = [shard("half", 20, 1, 2), shard("small", 1), shard("large", 200), shard("next", 60)]
    two = [shard("half", 20, 1, 2), shard("last", 30)]
    plan = Plan.of([zero, one, two], limit=100)
    assert [[whole[0].name for whole in batch.tensors] for batch in plan.batches] == [
        ["own", "half", "small"], ["large"], ["next", "last"],
    ]  # fmt: skip
    assert [batch.spans for batch in plan.batches] == [{1: (0, 48)}, {1: (0, 208)}, {1: (0, 64), 2: (64, 96)}]
    assert plan.owners["half", 1] == 1, "the first rank that holds it"
    assert plan.batches[0].places == {("half", 1): 0, ("small", 0): 32}
    assert [batch.nbytes for batch in plan.batches] == [48, 208, 96]
    assert not Plan.of([zero[:1], zero[:1]], limit=100).travels
