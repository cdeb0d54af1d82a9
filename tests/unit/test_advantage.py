"""Advantages against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from r3.advantage import advantages

REWARDS = np.array([1.0, 0.0, 0.0, 1.0, 5.0, 5.0])
GROUPS = np.array([0, 0, 0, 0, 1, 1])


def test_std_divides_by_the_group_deviation():
    got = advantages(REWARDS, GROUPS, "std")
    assert got[:4] == pytest.approx(np.array([0.5, -0.5, -0.5, 0.5]) / (np.std([1, 0, 0, 1], ddof=1) + 1e-4))


def test_a_group_of_equal_rewards_teaches_nothing():
    for kind in ("std", "mean", "leave_one_out"):
        assert advantages(REWARDS, GROUPS, kind)[4:].tolist() == [0, 0]


def test_mean_keeps_the_scale():
    assert advantages(REWARDS, GROUPS, "mean")[:4] == pytest.approx([0.5, -0.5, -0.5, 0.5])


def test_leave_one_out_uses_the_others():
    assert advantages(REWARDS, GROUPS, "leave_one_out")[:4] == pytest.approx([1 - 1 / 3, -2 / 3, -2 / 3, 1 - 1 / 3])


def test_interleaved_groups_and_lost_members():
    got = advantages(np.array([1.0, 3.0, 0.0]), np.array([7, 9, 7]), "mean")
    assert got.tolist() == [0.5, 0.0, -0.5]
    assert got.dtype == np.float32
