"""A Ray cluster of two nodes on this machine: who fetches what from whom. Prints one JSON object."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np

from r3.routing import RoutingTrace
from r3.transport import BatchRef, BlockRef, Fetched, fetch, pages, split, transport_metrics
from r3.types import Batch, Trajectory

LAYERS = tuple(range(6))
BLOCK_LAYERS = 2


def large_batch(rows: int = 40_000) -> Batch:
    """A batch in three blocks of 320 kB, far above the size that Ray sends within a call."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 100, rows + 1).astype(np.int32)
    first = generator.integers(0, 64, (rows, len(LAYERS), 1))
    wide = (first + 16 * np.arange(4)) % 64
    trace = RoutingTrace.record(wide, tokens, layers=LAYERS, num_experts=64, weight_version=0, engine="test")
    logprobs = np.zeros(rows, np.float32)
    return Batch.pack([Trajectory(0, 0, tokens, 1, logprobs, trace, 0.0, "stop", 0, "abc")], BLOCK_LAYERS)


def read(handle: BatchRef, layers: tuple[int, ...], copy: bool = False) -> Fetched:
    """What a rank with these MoE layers does."""
    (batch,), fetched = fetch([handle], layers)
    if not copy:
        return fetched
    where = pages([block.stored[0].copy() for block in batch.blocks])
    return replace(fetched, blocks=tuple(b._replace(page=p) for b, p in zip(fetched.blocks, where, strict=True)))


def stored(node: dict[str, Any]) -> tuple[int, int]:
    """Objects and bytes that the node's object store has taken in so far."""
    from ray._private.internal_api import node_stats

    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False).store_stats
    return stats.cumulative_created_objects, stats.cumulative_created_bytes


def main() -> None:
    import ray
    from ray.cluster_utils import Cluster

    size = 200 * 2**20
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 4, "resources": {"first": 8}, "object_store_memory": size},
    )
    cluster.add_node(num_cpus=4, resources={"second": 8}, object_store_memory=size)
    ray.init(address=cluster.address, log_to_driver=False)
    second = next(node for node in ray.nodes() if "second" in node["Resources"])

    blocks = len(LAYERS) // BLOCK_LAYERS
    make = ray.remote(lambda: split(large_batch(), blocks)).options(num_returns=1 + blocks, resources={"first": 1})
    core, *parts = make.remote()
    layers = [LAYERS[i : i + BLOCK_LAYERS] for i in range(0, len(LAYERS), BLOCK_LAYERS)]
    handle = BatchRef(core, tuple(map(BlockRef, layers, parts)))

    def reader(where: str, of: tuple[int, ...]) -> Any:
        return ray.remote(read).options(num_cpus=1, resources={where: 1}).remote(handle, of)

    ray.get(reader("second", ()))  # starts a worker process there, and brings the core
    begin = stored(second)
    ray.get(reader("second", LAYERS[-1:]))
    one = stored(second)
    found: list[Fetched] = ray.get([reader(where, LAYERS) for where in ("first", "second") for _ in range(2)])
    every = stored(second)
    by_node = [{block.page for rank in ranks for block in rank.blocks} for ranks in (found[:2], found[2:])]
    report = {
        "nodes": len({rank.node for rank in found}),
        "node_copies": transport_metrics(found)["transport/node_copies"],
        "places": {
            "blocks": blocks,
            "first node": len(by_node[0] - {None}),
            "second node": len(by_node[1] - {None}),
            "both": len((by_node[0] | by_node[1]) - {None}),
        },
        "for one stage": [after - before for before, after in zip(begin, one, strict=True)],
        "for all ranks": [after - before for before, after in zip(one, every, strict=True)],
        "block bytes": found[0].blocks[0].nbytes,
    }
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
