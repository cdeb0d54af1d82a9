"""Adversarial cases of value: rows that were never written, fillers, foreign id spaces, rows of others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from r3.config import RoutingConfig
from r3.errors import RoutingError
from r3.rollout.engine import Generation
from r3.rollout.policies import fate
from r3.routing import check_constant_layers
from tests.cases.payloads import (
    MODEL,
    TOKENS,
    Ids,
    alarms,
    decode,
    foreign_rows,
    one_layer_overwritten,
    payload,
    physical_ids,
    routed,
    wide,
)

LONG = np.arange(400, dtype=np.int32) % 90
LARGE = replace(MODEL, num_experts=128)
WIDEST = replace(MODEL, num_experts=256)


def written(change: Callable[[Ids], None], model=MODEL) -> Ids:
    rows = wide(model=model)
    change(rows)
    return rows


def put(index: tuple, value: object) -> Callable[[Ids], None]:
    def change(rows: Ids) -> None:
        rows[index] = value

    return change


def tail(rows: Ids) -> None:
    rows[5:] = 0


REFUSED = {
    "case-17 a layer whose kernel bypasses the capture": (
        written(put(np.s_[:, 4], 0)), MODEL, r"row 0, layer 4 .*never written.* 11 of 44",
    ),
    "case-17 a sample that was never finalised": (
        written(put(np.s_[:], 0)), MODEL, r"row 0, layer 1 .*never written.* 44 of 44",
    ),
    "case-17 the layers of another pipeline stage": (
        written(put(np.s_[:, 2:], 0)), MODEL, r"layer 2 .*never written.* 33 of 44",
    ),
    "case-18 255 as filler for shared experts": (
        written(put(np.s_[:, 1:, 2:], 255), LARGE), LARGE, "expert id 255 at row 0, layer 1, slot 2 is outside",
    ),
    "case-18 255 as filler where 255 is an expert": (
        written(put(np.s_[:, [1, 2, 4, 5], 2:], 255), WIDEST), WIDEST, r"row 0, layer 1 repeats an expert: .*255, 255",
    ),
    "case-19 padding of -1": (
        written(put(np.s_[9:, 1], -1)), MODEL, "expert id -1 at row 9, layer 1, slot 0 is outside",
    ),
    "case-19 padding of -1 in a 256-expert model": (
        written(put((9, 1, 0), -1), WIDEST), WIDEST, "expert id -1 at row 9, layer 1, slot 0 is outside",
    ),
    "case-20 the first id behind 255 experts": (
        written(put((0, 1, 0), 255), replace(MODEL, num_experts=255)), replace(MODEL, num_experts=255),
        "expert id 255 .* outside .0, 255",
    ),
    "case-20 the first id behind 256 experts, which would wrap to 0": (
        written(put((0, 1, 0), 256), WIDEST), WIDEST, "expert id 256 .* outside .0, 256",
    ),
    "case-20 the first id behind 384 experts": (
        written(put((0, 1, 0), 384), replace(MODEL, num_experts=384)), replace(MODEL, num_experts=384),
        "expert id 384 .* outside .0, 384",
    ),
    "case-23 a redundant physical expert": (
        written(put((3, 2, 1), MODEL.num_experts + 2)), MODEL, "expert id 18 .*physical ids",
    ),
    "case-24 an expert twice in a row": (
        written(put((4, 2, 1), wide()[4, 2, 0])), MODEL, "row 4, layer 2 repeats an expert",
    ),
    "case-26 the shared expert in the last column": (
        written(put(np.s_[:, [1, 2, 4, 5], 3], MODEL.num_experts)), MODEL, "expert id 16 at row 0, layer 1, slot 3",
    ),
    "case-34 rows dropped behind a full batch": (
        written(tail), MODEL, r"row 5, layer 1 .*never written.* 24 of 44",
    ),
    "case-47 the routing of a longer request": (wide(len(TOKENS) + 20), MODEL, "32 rows .* need 11 rows"),
}  # fmt: skip


@pytest.mark.parametrize(("sent", "model", "message"), REFUSED.values(), ids=REFUSED)
def test_malformed_values_are_refused_by_name(sent: Ids, model, message: str) -> None:
    with pytest.raises(RoutingError, match=message):
        decode(payload(sent), model=model)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("drop_sample", "drop"), ("native_sample", "native")],
    ids=["case-34 drop", "case-34 native"],
)
def test_a_refused_sample_is_dropped_or_trained_natively_where_the_policy_says_so(policy: str, expected: str) -> None:
    with pytest.raises(RoutingError) as caught:
        decode(payload(written(tail)))
    answer = Generation(TOKENS, 5, np.zeros(7, np.float32), None, "stop", 3, defect=caught.value)
    what, why = fate(answer, answer.defect, RoutingConfig(on_error=policy))
    assert what == expected
    assert "never written" in why
    with pytest.raises(RoutingError, match=r"never written.*routing\.on_error"):
        fate(answer, answer.defect, RoutingConfig())


@pytest.mark.parametrize(
    ("experts", "dtype"),
    [
        pytest.param(255, np.uint8, id="case-20 255 experts"),
        pytest.param(256, np.uint8, id="case-21 id 255 of 256 experts"),
        pytest.param(257, np.uint16, id="case-20 257 experts"),
        pytest.param(384, np.uint16, id="case-20 384 experts"),
    ],
)
def test_the_last_expert_is_an_expert_whatever_the_width(experts: int, dtype: type) -> None:
    model = replace(MODEL, num_experts=experts)
    rows = wide()
    rows[:, list(model.moe_layers), 2] = experts - 1
    trace = decode(payload(rows), model=model)
    assert trace.experts.dtype == dtype
    assert (trace.experts[:, :, 2] == experts - 1).all()


def accepted(sent: Ids) -> None:
    """Decode a long sample as the adapter does, then look at the whole batch as the worker does."""
    trace = decode(payload(sent), LONG)
    check_constant_layers([trace.experts], trace.layers)


def every_row(rows: Ids) -> None:
    rows[:, [1, 2, 4, 5]] = np.arange(4)


def one_layer(rows: Ids) -> None:
    rows[:, 2] = np.arange(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            every_row, r"layer 1 routes all 399 rows to \[0, 1, 2, 3\]|identical in all", id="case-25 all rows"
        ),
        pytest.param(one_layer, r"layer 2 routes all 399 rows to \[0, 1, 2, 3\]", id="case-25 one layer"),
    ],
)
def test_rows_that_never_change_are_refused(change: Callable[[Ids], None], message: str) -> None:
    rows = wide(len(LONG) - 1)
    accepted(rows)
    change(rows)
    with pytest.raises(RoutingError, match=message):
        accepted(rows)


def late(ids: Ids, other: Ids) -> Ids:
    """Rows of another request in the last fifth of the slots, as a cache group with a smaller page table gives."""
    changed = ids.copy()
    cut = 4 * len(ids) // 5
    changed[cut:] = np.resize(other, ids.shape)[cut:]
    return changed


UNSEEN = {
    "case-23 physical ids without redundancy": (physical_ids, {"overlap"}),
    "case-37 rows by the slots of another cache group": (foreign_rows, {"overlap"}),
    "case-37 one layer group by the slots of another": (one_layer_overwritten(2), {"layer"}),
    "case-47 the routing of a request of the same length": (foreign_rows, {"overlap"}),
}


@pytest.mark.parametrize(("change", "rules"), UNSEEN.values(), ids=UNSEEN)
def test_well_formed_rows_of_something_else_raise_an_alarm(change, rules: set[str]) -> None:
    records, own = routed()
    wrong = [change(record, records[i - 1]) for i, record in enumerate(records)]
    for record in wrong:
        sent = np.zeros((len(record), MODEL.num_layers, MODEL.top_k), np.int32)
        sent[:, list(MODEL.moe_layers)] = record
        decode(payload(sent), np.arange(len(record) + 1, dtype=np.int32))  # nothing structural to see
    assert alarms(records, own) == set()
    assert alarms(wrong, own) == rules


@pytest.mark.parametrize("case", [pytest.param(37, id="case-37 the last slots of a long sample")])
def test_a_stale_stretch_of_a_long_sample_raises_an_alarm(case: int) -> None:
    records, own = routed(samples=2, rows=3000)
    assert alarms(records, own) == set()
    assert alarms([late(records[0], records[1]), records[1]], own) == {"window"}


@pytest.mark.parametrize("case", [pytest.param(47, id="case-47 swapped behind the adapter")])
def test_rows_swapped_behind_the_adapter_fail_the_checksum(case: int) -> None:
    mine, other = TOKENS, TOKENS + 1
    trace = decode(payload(wide()), mine)
    with pytest.raises(RoutingError, match="routes of another sequence"):
        trace.verify(other)
