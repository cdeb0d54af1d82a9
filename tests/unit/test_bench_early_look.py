"""The benchmark of the early look reads every record, with and without it."""

from __future__ import annotations

import pytest

from scripts.bench import early_look


@pytest.mark.parametrize("look", [False, True])
def test_records_of_another_process_are_read(look: bool) -> None:
    assert early_look.one(requests=3, seconds=0.05, look=look) > 0
