"""Hypothesis strategies for routing records and trajectories."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from r3.routing import RoutingTrace, Span, checksum, expert_dtype
from r3.types import Trajectory


def distinct_experts(generator: np.random.Generator, rows: int, layers: int, k: int, num_experts: int) -> np.ndarray:
    """`[rows, layers, k]` int64 with distinct ids in every row."""
    order = generator.random((rows, layers, num_experts)).argsort(axis=2)
    return order[:, :, :k]


@st.composite
def records(draw: st.DrawFn, num_experts: int | None = None) -> tuple[RoutingTrace, np.ndarray, np.ndarray]:
    """A full record with its tokens `[S]` and the wide rows that it was made from."""
    experts = num_experts or draw(st.sampled_from([4, 16, 128, 255, 256, 257, 384]))
    k, layers = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    length = draw(st.integers(2, 20))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    wide = distinct_experts(generator, length - 1, layers, k, experts)
    tokens = generator.integers(0, 1000, length).astype(np.int32)
    trace = RoutingTrace.record(
        wide, tokens, layers=range(1, 2 * layers, 2), num_experts=experts, weight_version=3, engine="test 1"
    )
    return trace, tokens, wide


@st.composite
def trajectories(draw: st.DrawFn) -> list[Trajectory]:
    """Trajectories of one model; some carry no routing."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 8), st.booleans()), min_size=1, max_size=8))
    made = [trajectory(generator, i, prompt, response, routed) for i, (prompt, response, routed) in enumerate(lengths)]
    return [sharing(t, made[i - 1], draw(st.integers(0, 6))) if i % 2 else t for i, t in enumerate(made)]


def sharing(one: Trajectory, sibling: Trajectory, rows: int) -> Trajectory:
    """Give `one` the first tokens and routing rows of its sibling, as many as both have."""
    if one.routing is None or sibling.routing is None:
        return one
    rows = min(rows, one.routing.rows, sibling.routing.rows)
    tokens = np.concatenate([sibling.tokens[:rows], one.tokens[rows:]])
    experts = np.concatenate([sibling.routing.experts[:rows], one.routing.experts[rows:]])
    experts.flags.writeable = False
    return replace(one, tokens=tokens, routing=replace(one.routing, experts=experts, crc32=checksum(experts, tokens)))


def trajectory(generator: np.random.Generator, i: int, prompt: int, response: int, routed: bool = True) -> Trajectory:
    """One trajectory of a 16-expert, 4-layer, top-4 model."""
    tokens = generator.integers(0, 300, prompt + response).astype(np.int32)
    rows = distinct_experts(generator, len(tokens) - 1, 4, 4, 16)
    trace = RoutingTrace.record(rows, tokens, layers=range(4), num_experts=16, weight_version=i, engine="test 1")
    return Trajectory(
        group=i // 2,
        member=i % 2,
        tokens=tokens,
        prompt_len=prompt,
        logprobs=-generator.random(response).astype(np.float32),
        routing=trace if routed else None,
        reward=float(i % 3),
        finish="stop",
        weight_version=i,
        fingerprint="abc",
    )


@st.composite
def records_with_gaps(draw: st.DrawFn) -> tuple[RoutingTrace, np.ndarray]:
    """A valid record of any kind, with its tokens `[S]`: several weight versions, gaps, no rows at all, top-1."""
    experts = draw(st.sampled_from([1, 4, 16, 256, 257, 384]))
    k, layers = draw(st.integers(1, min(4, experts))), draw(st.integers(1, 3))
    length = draw(st.integers(0, 24))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens = generator.integers(0, 1000, length).astype(np.int32)
    cuts = sorted(draw(st.sets(st.integers(0, max(length - 1, 0)), max_size=6)))
    spans = tuple(
        Span(begin, end, draw(st.integers(-(2**63), 2**63 - 1)))
        for begin, end in zip(cuts[::2], cuts[1::2], strict=False)
    )
    rows = distinct_experts(generator, sum(span.end - span.begin for span in spans), layers, k, experts)
    ids = rows.astype(expert_dtype(experts))
    trace = RoutingTrace(
        experts=ids,
        layers=tuple(sorted(draw(st.sets(st.integers(0, 2**16 - 1), min_size=layers, max_size=layers)))),
        num_experts=experts,
        spans=spans,
        engine=draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=20)),
        provenance=draw(st.sampled_from(["exact", "unknown"])),
        crc32=checksum(ids, tokens),
    )
    return trace, tokens
