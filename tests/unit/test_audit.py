"""Which rows the audit looks at, what it makes of the sums, and which alarm each kind of wrong record raises."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r3 import audit
from r3.audit import Alarm, AuditError, choose_windows, find_alarms, overlap_metrics
from r3.metrics import AUDIT_WINDOWS, RouterCounts

LAYERS = (1, 2, 3, 5, 6)
ROWS = 1000


@settings(deadline=None)
@given(rows=st.integers(0, 10**7), turn=st.integers(0, 10**6))
def test_windows_are_whole_bounded_and_inside_the_step(rows: int, turn: int) -> None:
    windows = choose_windows(rows, turn)
    assert len(windows) <= AUDIT_WINDOWS
    if not rows:
        assert not len(windows)
        return
    sizes = windows[:, 1] - windows[:, 0]
    assert (sizes >= min(rows, audit.WINDOW_ROWS)).all()
    assert (sizes < 2 * audit.WINDOW_ROWS).all()
    assert (windows[1:, 0] >= windows[:-1, 1]).all(), "sorted and disjoint"
    assert 0 <= windows[0, 0] < windows[-1, 1] <= rows


def test_a_small_step_is_audited_whole_and_a_large_one_in_turns() -> None:
    small = choose_windows(AUDIT_WINDOWS * audit.WINDOW_ROWS, 5)
    assert small[0, 0] == 0
    assert small[-1, 1] == AUDIT_WINDOWS * audit.WINDOW_ROWS
    assert (small[1:, 0] == small[:-1, 1]).all()
    rows = 4 * AUDIT_WINDOWS * audit.WINDOW_ROWS
    seen = np.zeros(rows, bool)
    for turn in range(4):
        for begin, end in choose_windows(rows, turn):
            seen[begin:end] = True
    assert seen.all(), "consecutive steps look at other windows"


def counts(lags: np.ndarray, windows: np.ndarray | None = None, rows: int = ROWS, sampled: float = 0) -> RouterCounts:
    """The sums of a pass with these mean overlaps `[layers, 3]`, and `[n]` means of windows.

    `sampled`: what is taken from the overlap of the half of the rows whose token was sampled, and given to the others.
    """
    made = RouterCounts.zero(len(lags), 4)
    apart = np.stack([lags + sampled, lags - sampled], 2)
    made.overlap[:], made.overlap_pairs[:] = apart * (rows / 2), rows // 2
    means = lags[:, 1].mean(keepdims=True) if windows is None else windows
    made.windows[: len(means)] = np.stack([means * 256, np.full(len(means), 256)], 1)
    return made


def report(
    lags: np.ndarray, windows: np.ndarray | None = None, rows: int = ROWS, sampled: float = 0
) -> dict[str, float]:
    where = np.stack([np.arange(AUDIT_WINDOWS), np.arange(1, AUDIT_WINDOWS + 1)], 1) * 256
    return overlap_metrics(
        counts(lags, windows, rows, sampled), LAYERS, where[: 1 if windows is None else len(windows)]
    )


def healthy() -> np.ndarray:
    return np.tile([0.609, 0.989, 0.609], (len(LAYERS), 1))


def test_the_numbers_are_means_over_the_audited_rows() -> None:
    lags = healthy()
    lags[3] = [0.7, 0.9, 0.4]
    found = report(lags, np.array([0.98, 0.95, 0.99]))
    assert found["router/lag0_overlap"] == pytest.approx(lags[:, 1].mean())
    assert found["router/lag_margin"] == pytest.approx(lags[:, 1].mean() - lags[:, 0].mean())
    assert found["router/overlap_layer/5"] == pytest.approx(0.9)
    assert found["router/lag_margin_layer/5"] == pytest.approx(0.2)
    assert found["router/overlap_window_min"] == pytest.approx(0.95)
    assert found["router/overlap_window_row"] == 256
    assert found["router/audited_rows"] == ROWS


def test_rows_of_sampled_tokens_are_not_hidden_by_a_shared_prompt() -> None:
    lags = healthy()
    lags[:, 1] = 0.75
    found = report(lags, sampled=0.25)
    assert found["router/lag0_overlap"] == pytest.approx(0.75)
    assert found["router/overlap_prompt"] == pytest.approx(1)
    assert found["router/overlap_sampled"] == found["router/overlap_layer/3"] == pytest.approx(0.5)
    assert [alarm.rule for alarm in find_alarms(found, 0.7)] == ["overlap"]
    few = report(lags, rows=2 * audit.MIN_ROWS - 2, sampled=0.25)
    assert not {"router/overlap_prompt", "router/overlap_sampled"} & few.keys()
    assert few["router/overlap_layer/3"] == pytest.approx(0.75)


def test_a_pass_without_a_record_has_no_numbers() -> None:
    assert overlap_metrics(RouterCounts.zero(5, 4), LAYERS, choose_windows(0, 0)) == {}
    assert find_alarms({}, 0.6) == ()


def shifted(lags: np.ndarray) -> None:
    lags[:] = [0.608, 0.608, 0.989]


def one_layer_shifted(lags: np.ndarray) -> None:
    lags[2] = [0.989, 0.62, 0.61]


def unrelated(lags: np.ndarray) -> None:
    lags[:] = [0.153, 0.154, 0.155]


def one_layer_foreign(lags: np.ndarray) -> None:
    lags[2] = [0.18, 0.185, 0.18]


def two_layers_swapped(lags: np.ndarray) -> None:
    lags[[1, 4]] = [0.25, 0.25, 0.25]


# The overlaps are those of docs/detection.md.
@pytest.mark.parametrize(
    ("change", "rules"),
    [
        (shifted, [("lag", None)]),
        (one_layer_shifted, [("lag", 3)]),
        (unrelated, [("overlap", None)]),
        (one_layer_foreign, [("layer", 3)]),
        (two_layers_swapped, [("layer", 2), ("layer", 6)]),
        (lambda lags: None, []),
    ],
)
def test_each_kind_of_wrong_record_raises_its_alarm(change, rules) -> None:
    lags = healthy()
    change(lags)
    alarms = find_alarms(report(lags), 0.6)
    assert [(alarm.rule, alarm.layer) for alarm in alarms] == rules
    for alarm in alarms:
        assert alarm.value < alarm.threshold
        assert f"{alarm.value:.3f}" in alarm.sentence


def test_a_stale_window_is_named() -> None:
    windows = np.array([0.98, 0.99, 0.2, 0.99])
    (alarm,) = find_alarms(report(healthy(), windows), 0.6, lambda row: f"the sample of row {row}")
    assert (alarm.rule, alarm.window) == ("window", 512)
    assert alarm.value == pytest.approx(0.2)
    assert "from the sample of row 512 on" in alarm.sentence


def test_a_router_that_sends_every_token_the_same_way_is_no_alarm() -> None:
    lags = np.tile([0.97, 0.96, 0.98], (len(LAYERS), 1))
    assert find_alarms(report(lags), 0.6) == ()


def test_a_handful_of_rows_proves_nothing() -> None:
    lags = healthy()
    unrelated(lags)
    assert find_alarms(report(lags, rows=audit.MIN_ROWS - 2), 0.6) == ()
    assert find_alarms(report(lags, rows=audit.MIN_ROWS), 0.6)


def test_without_a_minimum_the_relative_rules_remain() -> None:
    lags = healthy()
    one_layer_foreign(lags)
    assert [alarm.layer for alarm in find_alarms(report(lags), 0)] == [3]
    unrelated(lags)
    assert find_alarms(report(lags), 0) == ()


def test_the_error_survives_an_actor_and_says_every_sentence() -> None:
    alarm = Alarm("layer", 0.1, 0.5, "layer 3 is wrong", layer=3)
    error = AuditError("step 4", (alarm, replace(alarm, sentence="so is layer 4", layer=4)))
    again = pickle.loads(pickle.dumps(error))
    assert again.alarms == error.alarms
    assert str(again) == "step 4: layer 3 is wrong; so is layer 4"
    assert again.exit_code == 3
