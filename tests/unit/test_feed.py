"""Microbatches are laid out when they are asked for; the content of their records is checked behind, and in time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from r3.errors import RoutingError
from r3.routing import RoutingTrace, checksum
from r3.trainer import records
from r3.trainer.batching import Form, StepBatch, microbatch
from r3.trainer.feed import MicroBatches, StepShare, finish_checks, largest_shape
from r3.types import Record
from tests.unit.test_batching import SPEC, step_of, trajectory

SAMPLES = ((0, 1), (2,), ())


@pytest.fixture
def step() -> StepBatch:
    return step_of(trajectory(0, response=2), trajectory(1, response=5), trajectory(2, response=9))


def changed(step: StepBatch, sample: int, change: Callable[[RoutingTrace], RoutingTrace]) -> StepBatch:
    """The step with one record's blocks changed."""
    record = step.records[sample]
    assert record is not None
    records = list(step.records)
    records[sample] = Record(record.spans, tuple(change(block) for block in record.blocks))
    return replace(step, records=tuple(records))


def broken(step: StepBatch, sample: int) -> StepBatch:
    """The step with rows of one record in another order than they were sealed in."""
    return changed(step, sample, lambda block: replace(block, experts=np.roll(block.experts, 1, axis=0)))


def repeating(step: StepBatch, sample: int) -> StepBatch:
    """The step with an expert twice in row 1, layer 3 of one record, sealed so."""

    def twice(block: RoutingTrace) -> RoutingTrace:
        experts, column = block.experts.copy(), block.layers.index(3)
        experts[1, column, 0] = experts[1, column, 1]
        return replace(block, experts=experts, crc32=checksum(experts, step.trajectories[sample].tokens))

    return changed(step, sample, twice)


@pytest.mark.parametrize("packed", [False, True])
def test_they_are_those_that_are_made_at_once(step: StepBatch, packed: bool) -> None:
    form = Form(packed=packed)
    fed = MicroBatches(step, SAMPLES, SPEC, form)
    expected = [microbatch(step, samples, SPEC, form) for samples in SAMPLES]
    shape = largest_shape(fed)
    assert fed.seconds == 0, "asking for the shape makes none"
    assert shape == largest_shape(expected)
    for one, other in zip(fed, expected, strict=True):
        assert one.shape == other.shape
        assert one.rows == other.rows
        for name in ("tokens", "targets", "experts", "recorded", "pads", "order", "windows", "sampled"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert fed.seconds > 0
    assert all(one is other for one, other in zip(fed, fed, strict=True)), "kept once they are made"
    fed.checks.finish()


def breaks(fed: MicroBatches) -> None:
    """Stand for a pass that breaks behind its last microbatch."""
    assert list(fed)
    raise ValueError("shapes of experts differ")


def test_mini_steps_take_their_own(step: StepBatch) -> None:
    fed = MicroBatches(step, SAMPLES, SPEC, Form())
    parts = StepShare(step, fed, (2, 1), planned_s=1.5)
    assert [[one.shape for one in part] for part in parts.mini_steps] == [[fed[0].shape, fed[1].shape], [fed[2].shape]]
    assert parts.seconds == 1.5 + fed.seconds


def test_content_is_checked_before_the_end(step: StepBatch) -> None:
    fed = MicroBatches(broken(step, 2), SAMPLES, SPEC, Form())
    assert fed[0].recorded.any()
    fed.checks.finish()
    assert fed[1].recorded.any(), "laying out waits for no check of content"
    with pytest.raises(RoutingError, match=r"group 2, member 0.*checksum"):
        fed.checks.finish()


def test_a_broken_record_is_the_cause_of_what_it_breaks(step: StepBatch) -> None:
    fed = MicroBatches(broken(step, 0), SAMPLES, SPEC, Form())
    with pytest.raises(RoutingError, match=r"group 0, member 0.*checksum"), fed.checks:
        breaks(fed)


def test_a_row_that_repeats_an_expert_is_named_once_a_pass_has_failed(step: StepBatch) -> None:
    """The seal is right, so the pass must find it on the device."""
    fed = MicroBatches(repeating(step, 2), SAMPLES, SPEC, Form())
    with fed.checks:
        assert list(fed)
    with pytest.raises(RoutingError, match=r"group 2, member 0.*row 1, layer 3 repeats an expert"), fed.checks:
        breaks(fed)


def test_seals_are_checked_behind_the_next_microbatch(step: StepBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    monkeypatch.setattr(records, "check_seals", lambda records: checked.append(len(records)))
    fed = MicroBatches(step, ((0, 1), (2,), (0, 1, 2)), SPEC, Form())
    assert fed[0].recorded.any()
    assert checked == [], "a device would wait for its first work"
    assert fed[1].recorded.any()
    assert checked == [2]
    assert fed[2].recorded.any()
    assert checked == [2, 1]
    finish_checks(fed)
    fed.checks.finish()
    assert checked == [2, 1, 3], "each once, and nothing is left out"
    finish_checks([fed[0]])  # microbatches that were checked before


def test_a_pass_stops_at_a_broken_seal(step: StepBatch) -> None:
    fed = MicroBatches(broken(step, 0), SAMPLES, SPEC, Form())
    assert fed[0].recorded.any(), "laying out waits for no seal of its own"
    with pytest.raises(RoutingError, match=r"group 0, member 0.*checksum"):
        assert fed[1]
    with pytest.raises(RoutingError, match=r"group 0, member 0.*checksum"):
        fed.checks.finish()


def test_an_error_of_the_pass_stays_where_records_are_sound(step: StepBatch) -> None:
    fed = MicroBatches(step, SAMPLES, SPEC, Form())
    with pytest.raises(ValueError, match="shapes"), fed.checks:
        breaks(fed)


def test_an_id_that_the_model_lacks_never_reaches_the_device(step: StepBatch) -> None:
    outside = changed(step, 2, lambda block: replace(block, experts=block.experts + np.uint8(200)))
    fed = MicroBatches(outside, SAMPLES, SPEC, Form())
    with pytest.raises(RoutingError, match=r"group 2, member 0.*outside"):
        assert fed[1]


def test_nothing_to_check_is_nothing_wrong(step: StepBatch) -> None:
    fed = MicroBatches(replace(step, records=(None, None, None)), SAMPLES, SPEC, Form())
    with fed.checks:
        assert [one.experts for one in fed] == [None, None, None]
