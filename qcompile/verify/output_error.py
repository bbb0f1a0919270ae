"""How far outputs are from their reference, relative to the largest of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class OutputError:
    """Collects the largest difference and the largest value of every output over all pieces of the inputs."""

    def __init__(self) -> None:
        self._difference: dict[int, float] = {}
        self._largest: dict[int, float] = {}

    def add(self, index: int, expected: NDArray[Any], actual: NDArray[Any]) -> None:
        """Compare one piece of output `index`; other shapes, or NaN on one side only, count as infinite."""
        worst = float("inf")
        if expected.shape == actual.shape:
            a, b = expected.astype(np.float64), actual.astype(np.float64)
            with np.errstate(invalid="ignore"):
                distance = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
            worst = float("inf") if np.isnan(distance).any() else float(distance.max(initial=0.0))
            largest = float(np.abs(a[np.isfinite(a)]).max(initial=0.0))
            self._largest[index] = max(self._largest.get(index, 0.0), largest)
        self._difference[index] = max(self._difference.get(index, 0.0), worst)

    def of(self, index: int) -> float:
        """The relative error of one output; absolute where the output is all zeros."""
        return self._difference.get(index, 0.0) / (self._largest.get(index) or 1.0)

    def worst(self) -> float:
        """The largest relative error of all outputs."""
        return max((self.of(index) for index in self._difference), default=0.0)
