"""Payloads as SGLang would have sent them, and well-formed records that are wrong."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from r3.audit import LAGS, choose_windows, find_alarms, overlap_metrics
from r3.metrics import RouterCounts
from r3.rollout.wire import decode_sglang
from r3.routing import RoutingTrace
from r3.types import ModelSpec

# Layers 0 and 3 are dense.
MODEL = ModelSpec("qwen3_moe", 6, (1, 2, 4, 5), 16, 4, 64, 100)
TOKENS = np.arange(10, 22, dtype=np.int32)

Ids = NDArray[Any]
# (ids of the record [rows, layers, k], ids of another sample's record) -> ids as they are returned
Corruption = Callable[[Ids, Ids], Ids]


def wide(rows: int = len(TOKENS) - 1, model: ModelSpec = MODEL, seed: int = 0) -> NDArray[np.int32]:
    """Return `[rows, num_layers, k]` as SGLang holds it: distinct experts in MoE layers, zeros in dense ones."""
    generator = np.random.default_rng(seed)
    ids = generator.random((rows, model.num_layers, model.num_experts)).argsort(2)[:, :, : model.top_k]
    ids[:, [layer for layer in range(model.num_layers) if layer not in model.moe_layers]] = 0
    return ids.astype(np.int32)


def payload(ids: Ids) -> str:
    """Return `meta_info.routed_experts` of these ids."""
    return base64.b64encode(np.ascontiguousarray(ids, dtype="<i4").tobytes()).decode()


def decode(sent: str | None, tokens: NDArray[np.int32] = TOKENS, model: ModelSpec = MODEL) -> RoutingTrace:
    """Decode a payload as the SGLang adapter does."""
    return decode_sglang(sent, tokens, model, request=7, weight_version=3, engine="sglang 0.5.23").routing


def rows_shifted(by: int) -> Corruption:
    """Give every token the experts of the one `by` before it."""
    return lambda ids, other: np.roll(ids, by, axis=0)


def rows_shuffled(ids: Ids, other: Ids) -> Ids:
    """Permute the rows of a sample."""
    return ids[np.random.default_rng(len(ids)).permutation(len(ids))]


def foreign_rows(ids: Ids, other: Ids) -> Ids:
    """Return the rows of another sample, as a batch or slot index that is off would."""
    return np.resize(other, ids.shape)


def layers_swapped(*columns: int) -> Corruption:
    """Swap these columns, pair by pair."""

    def swap(ids: Ids, other: Ids) -> Ids:
        order = np.arange(ids.shape[1])
        for a, b in zip(columns[::2], columns[1::2], strict=True):
            order[[a, b]] = order[[b, a]]
        return ids[:, order]

    return swap


def physical_ids(ids: Ids, other: Ids) -> Ids:
    """Rename the experts, as load balancing without redundant experts does."""
    experts = int(max(ids.max(), other.max())) + 1
    return np.random.default_rng(0).permutation(experts)[ids]


def one_layer_overwritten(column: int) -> Corruption:
    """Put another sample's rows into one layer, as a draft model that writes into the target's buffer does."""

    def overwrite(ids: Ids, other: Ids) -> Ids:
        changed = ids.copy()
        changed[:, column] = np.resize(other, ids.shape)[:, column]
        return changed

    return overwrite


def alarms(records: list[Ids], own: list[Ids], model: ModelSpec = MODEL) -> set[str]:
    """Return the rules that the audit breaks over samples whose trainer would have chosen `own`, ids `[rows, L, k]`.

    A plain numpy stand-in for the trainer's counters, which tests/megatron/test_audit.py runs on a live model.
    """
    layers = len(model.moe_layers)
    counts = RouterCounts.zero(layers, model.num_experts)
    windows = choose_windows(sum(map(len, records)), 0)
    first = 0
    for record, chosen in zip(records, own, strict=True):
        for index, lag in enumerate(LAGS):
            here = slice(max(0, -lag), len(record) - max(0, lag))
            there = slice(max(0, lag), len(record) + min(0, lag))
            hits = (record[there][..., None] == chosen[here][:, :, None, :]).any(-1).mean(-1)
            # The first half of every sample is its prompt.
            sampled = np.arange(here.start, here.stop) >= len(record) // 2
            for part, of in enumerate((~sampled, sampled)):
                counts.overlap[:, index, part] += hits[of].sum(0)
                counts.overlap_pairs[:, index, part] += of.sum()
            if lag == 0:
                rows = first + np.arange(len(hits))
                for number, (begin, end) in enumerate(windows):
                    inside = hits[(rows >= begin) & (rows < end)]
                    counts.windows[number] += inside.sum(), inside.size
        first += len(record)
    found = find_alarms(overlap_metrics(counts, model.moe_layers, windows), min_overlap=0.7)
    return {alarm.rule for alarm in found}


def routed(samples: int = 24, rows: int = 40, model: ModelSpec = MODEL) -> tuple[list[Ids], list[Ids]]:
    """Return what an engine chose in some samples, `[rows, L, k]` each, and what a trainer would, 3 % of ids aside."""
    generator = np.random.default_rng(1)
    columns = list(model.moe_layers)
    records = [wide(rows, model, seed)[:, columns] for seed in range(samples)]
    own = []
    for record in records:
        chosen = record.copy()
        flip = generator.random(chosen.shape) < 0.03
        chosen[flip] = generator.integers(0, model.num_experts, int(flip.sum()))
        own.append(chosen)
    return records, own
