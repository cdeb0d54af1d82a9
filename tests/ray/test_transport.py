"""Blocks of a record are fetched by layer and mapped, not copied: by the pages of the arrays themselves."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3.config import Config
from r3.errors import CheckpointError
from r3.loop import saves_records
from r3.record import read_records
from r3.transport import BatchRef, Fetched, Mapped, Page, Saving, fetch, pages, transport_metrics
from r3.types import Batch
from tests.command import ROOT
from tests.ray.two_nodes import LAYERS, large_batch, read
from tests.unit.strategies import trajectory


def mapped(*where: Page | None, node: str = "a", seconds: float = 0.5) -> list[Fetched]:
    """Ranks of one node that hold block 0 of batch 0 at `where`."""
    return [Fetched(node, seconds, (Mapped(0, (0, 1), 10, page),)) for page in where]


def test_copies_are_counted_by_page_node_and_block() -> None:
    one, other = Page("00:1b", 7, 4096), Page("00:1b", 7, 8192)
    assert transport_metrics(mapped(one, one, one))["transport/node_copies"] == 1
    assert transport_metrics(mapped(one, other, one))["transport/node_copies"] == 2, "one file, another offset"
    assert transport_metrics(mapped(one, one._replace(inode=8)))["transport/node_copies"] == 2
    assert transport_metrics(mapped(one, None, None))["transport/node_copies"] == 3, "private memory is a copy each"
    apart = mapped(one, one) + mapped(other, other, node="b", seconds=2)
    assert transport_metrics(apart) == {"transport/node_copies": 1, "transport/get_s": 2}
    assert transport_metrics([Fetched("a", 0.25, ())]) == {"transport/get_s": 0.25}


def test_pages_are_those_of_the_file_behind_an_array(tmp_path: Path) -> None:
    (tmp_path / "store").write_bytes(bytes(4 * mmap.PAGESIZE))
    with (tmp_path / "store").open("r+b") as file:
        first, second = (np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8) for _ in range(2))
    assert first.ctypes.data != second.ctypes.data
    here, there, later, copy = pages([first[100:], second[100:], first[5000:], first.copy()])
    assert here == there
    assert here is not None
    assert later == here._replace(offset=5000)
    assert (here.inode, here.offset) == ((tmp_path / "store").stat().st_ino, 100)
    assert copy is None


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_four_processes_map_one_copy_of_each_block() -> None:
    import ray

    batch = large_batch()
    handle = BatchRef.put(batch)
    readers = [ray.remote(Reader).options(num_cpus=1).remote() for _ in range(4)]
    found: list[Fetched] = ray.get([reader.fetch.remote(handle) for reader in readers])
    assert transport_metrics(found)["transport/node_copies"] == 1
    places = {block.page for rank in found for block in rank.blocks}
    assert len(places) == len(batch.blocks) == 3
    assert None not in places
    copied: list[Fetched] = ray.get([reader.fetch.remote(handle, copy=True) for reader in readers])
    assert transport_metrics(copied)["transport/node_copies"] == 4, "copies are not seen"
    some: Fetched = ray.get(readers[0].fetch.remote(handle, layers=(2, 5)))
    assert [block.layers for block in some.blocks] == [(2, 3), (4, 5)]
    assert some.node == ray.get_runtime_context().get_node_id()
    for reader in readers:
        ray.kill(reader)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_what_is_fetched_is_the_batch() -> None:
    batch = large_batch()
    (found,), _ = fetch([BatchRef.put(batch)])
    assert found.facts() == batch.facts()
    for before, after in zip(batch.trajectories(), found.trajectories(), strict=True):
        assert before.routing is not None
        assert after.routing is not None
        np.testing.assert_array_equal(before.routing.experts, after.routing.experts)
        after.routing.verify(after.tokens)


class Reader:
    """A rank; `copy` is what a careless one would do."""

    def fetch(self, handle: BatchRef, layers: tuple[int, ...] = LAYERS, copy: bool = False) -> Fetched:
        return read(handle, layers, copy)


@pytest.mark.ray
def test_each_node_fetches_a_block_once() -> None:
    """Two Ray nodes on this machine; the counts are those of the second one's object store."""
    command = [sys.executable, "-m", "tests.ray.two_nodes"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert found["nodes"] == 2
    assert found["node_copies"] == 1
    assert found["places"] == {"blocks": 3, "first node": 3, "second node": 3, "both": 6}
    # What the second node took in: the block of one stage, then what its two other ranks lacked, once for both.
    for key, blocks in (("for one stage", 1), ("for all ranks", 2)):
        objects, size = found[key]
        assert objects == blocks
        assert blocks * found["block bytes"] <= size < (blocks + 0.5) * found["block bytes"]


def test_records_of_every_nth_step_are_saved() -> None:
    def saved(**routing: Any) -> list[int]:
        config = Config.model_validate({"routing": routing, "replay": {"mode": "none"}})
        return [step for step in range(1, 10) if saves_records(config, step)]

    assert saved() == []
    assert saved(save_every=4) == [4, 8]
    assert saved(save_every=1) == list(range(1, 10))
    assert saved(save_every=1, capture=False) == []


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_records_are_saved_by_a_task_and_read_back(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    made = [trajectory(generator, i, 3, 5, routed=i != 1) for i in range(4)]
    handles = [BatchRef.put(Batch.pack(made[:2], 2)), BatchRef.put(Batch.pack(made[2:], 3))]
    file = tmp_path / "routing" / "step-00000004.r3"
    assert Saving.start(file, handles).wait() == 3
    found = list(read_records(file))
    for stored, before in zip(found, [one for one in made if one.routing is not None], strict=True):
        assert np.array_equal(stored.trace.experts, before.routing.experts)
        assert np.array_equal(stored.tokens, before.tokens)
        assert stored.trace.crc32 == before.routing.crc32


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_file_that_cannot_be_saved_is_named(tmp_path: Path) -> None:
    (tmp_path / "routing").write_text("a file where the folder should be")
    batch = BatchRef.put(Batch.pack([trajectory(np.random.default_rng(0), 0, 3, 5)]))
    with pytest.raises(CheckpointError, match=r"step-00000004\.r3 cannot be written"):
        Saving.start(tmp_path / "routing" / "step-00000004.r3", [batch]).wait()
