"""Adversarial cases of shape: how many rows and layers came, where they lie, and what may be done with the array."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from r3.errors import RoutingError
from r3.trainer.batching import StepBatch
from r3.trainer.records import needed_blocks
from r3.types import Batch, ModelSpec, Record, Trajectory
from tests.cases.payloads import MODEL, TOKENS, Ids, alarms, decode, foreign_rows, payload, routed, wide

ROWS = len(TOKENS) - 1


def trajectory(tokens: Ids, routing: Ids, group: int = 0, model: ModelSpec = MODEL) -> Trajectory:
    """A sample with a prompt of one token."""
    trace = decode(payload(routing), tokens, model)
    logprobs = np.zeros(len(tokens) - 1, np.float32)
    return Trajectory(group, 0, tokens, 1, logprobs, trace, 0.0, "stop", 3, model.fingerprint)


REFUSED = {
    "case-6 one row more, for the last token": (wide(ROWS + 1), MODEL, "12 rows of 6 layers .* 12 tokens need 11 rows"),
    "case-6 one row less": (wide(ROWS - 1), MODEL, "10 rows .* need 11 rows"),
    "case-7 response rows without the prompt's": (wide(6), MODEL, "6 rows .* need 11 rows"),
    # 24 layers of top-16 are as many bytes as 48 of top-8: what sits in a dense layer's place tells them apart.
    "case-8 a size that fits another layer count": (
        wide(ROWS, replace(MODEL, num_layers=3, moe_layers=(0, 1, 2), top_k=8)),
        MODEL,
        "layer 0 is dense",
    ),
    "case-12 first dense layers counted as MoE layers": (
        wide(ROWS, replace(MODEL, moe_layers=(0, 1, 2, 3, 4, 5))),
        replace(MODEL, moe_layers=(2, 3, 4, 5)),
        "layer 0 is dense",
    ),
    "case-12 interleaved layers sent as if the first were dense": (
        wide(ROWS, replace(MODEL, moe_layers=(3, 4, 5))),
        replace(MODEL, moe_layers=(1, 3, 5)),
        "layer 4 is dense",
    ),
    "case-52 an extra column of a multi-token-prediction layer": (
        wide(ROWS, replace(MODEL, num_layers=7, moe_layers=(1, 2, 4, 5, 6))),
        MODEL,
        r"12\.8333 rows of 6 layers",
    ),
}


@pytest.mark.parametrize(("sent", "model", "message"), REFUSED.values(), ids=REFUSED)
def test_rows_or_layers_that_do_not_fit_are_refused(sent: Ids, model: ModelSpec, message: str) -> None:
    with pytest.raises(RoutingError, match=message):
        decode(payload(sent), model=model)


@pytest.mark.parametrize(
    "moe_layers",
    [
        pytest.param((2, 3, 4, 5), id="case-12 the first two dense"),
        pytest.param((1, 3, 5), id="case-12 every other layer"),
        pytest.param((0, 1, 2, 4, 5), id="case-12 one in the middle"),
    ],
)
def test_dense_layers_are_dropped_where_the_checkpoint_has_them(moe_layers: tuple[int, ...]) -> None:
    model = replace(MODEL, moe_layers=moe_layers)
    sent = wide(model=model)
    trace = decode(payload(sent), model=model)
    assert trace.layers == moe_layers
    np.testing.assert_array_equal(trace.experts, sent[:, list(moe_layers)])


@pytest.mark.parametrize(
    ("tokens", "rows"),
    [
        pytest.param(1, 0, id="case-16 a prompt of one token that was aborted"),
        pytest.param(2, 1, id="case-16 a prompt of one token, one sampled"),
    ],
)
def test_the_shortest_samples_have_the_rows_that_they_can_have(tokens: int, rows: int) -> None:
    trace = decode(payload(wide(rows)), TOKENS[:tokens])
    assert trace.rows == rows
    assert len(trace.spans) == rows
    trace.verify(TOKENS[:tokens])


def other_request(record: Ids, previous: Ids) -> Ids:
    return foreign_rows(record, previous)


def halves(record: Ids, previous: Ids) -> Ids:
    """Two layers of top-8, as many bytes and distinct ids in each half, read as four layers of top-4."""
    sender = replace(MODEL, num_layers=2, moe_layers=(0, 1), top_k=8)
    return wide(len(record), sender, seed=int(record[0, 0, 0])).reshape(record.shape)


UNSEEN = {
    "case-8 a size that fits another layer count and no dense layer tells": halves,
    "case-36 rows by slot read as rows by place in the batch": other_request,
}


@pytest.mark.parametrize("change", UNSEEN.values(), ids=UNSEEN)
def test_well_formed_rows_of_something_else_raise_an_alarm(change: Callable[[Ids, Ids], Ids]) -> None:
    records, own = routed()
    mixed = [change(record, records[i - 1]) for i, record in enumerate(records)]
    for record in mixed:
        decode(payload(_with_dense(record)), np.arange(len(record) + 1, dtype=np.int32))  # nothing structural to see
    assert alarms(records, own) == set()
    assert alarms(mixed, own) == {"overlap"}


@pytest.mark.parametrize("case", [pytest.param(48, id="case-48 a record is read-only")])
def test_writing_into_a_record_is_refused(case: int) -> None:
    trace = decode(payload(wide()))
    with pytest.raises(ValueError, match="read-only"):
        trace.experts[0, 0, 0] = 1
    trace.verify(TOKENS)


@pytest.mark.parametrize("case", [pytest.param(50, id="case-50 a batch padded to its longest sample")])
def test_a_batch_holds_the_rows_that_exist_and_no_padding(case: int) -> None:
    lengths = (4, 300, 7)
    samples = [
        trajectory(np.arange(n, dtype=np.int32) % 90, wide(n - 1, seed=n), group=i) for i, n in enumerate(lengths)
    ]
    batch = Batch.pack(samples)
    assert batch.routing_bytes == MODEL.routing_bytes(sum(lengths) - len(lengths))
    assert batch.routing_bytes < MODEL.routing_bytes(len(lengths) * max(lengths)) / 2


@pytest.mark.parametrize("case", [pytest.param(52, id="case-52 a record that names the layer behind the decoder")])
def test_a_record_with_a_prediction_layer_does_not_fit_the_decoder(case: int) -> None:
    # The trainer's side, an MTP router that counts from 1 again, is tests/megatron/test_limits.py.
    larger = replace(MODEL, num_layers=7, moe_layers=(1, 2, 4, 5, 6))
    sample = trajectory(TOKENS, wide(model=larger), model=larger)
    step = StepBatch.join([Batch.pack([sample])], None, larger)
    record: Record | None = step.records[0]
    assert record is not None
    with pytest.raises(RoutingError, match="the record is for layers"):
        needed_blocks(step.trajectories[0], record, MODEL, MODEL.moe_layers)


def _with_dense(record: Ids) -> Ids:
    full = np.zeros((len(record), MODEL.num_layers, MODEL.top_k), np.int32)
    full[:, list(MODEL.moe_layers)] = record
    return full
