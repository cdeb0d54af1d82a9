"""Kinds of token rows, counted while microbatches are made."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class RowClasses:
    """Rows of some microbatches by kind, known before the pass.

    `rows`: token positions that are not pads; `required`: recorded rows that a trained token's log-prob depends on;
    `missing`: such rows without a record; `pads`.
    """

    rows: int = 0
    required: int = 0
    missing: int = 0
    pads: int = 0

    def __add__(self, other: RowClasses) -> RowClasses:
        return RowClasses(
            self.rows + other.rows,
            self.required + other.required,
            self.missing + other.missing,
            self.pads + other.pads,
        )
