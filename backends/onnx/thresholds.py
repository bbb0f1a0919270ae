"""Offsets that make a float requantisation choose exactly the normative codes.

The contract's code of an accumulator a is clip((m a + c) >> e). As a function of the integer a it is a
staircase: code k begins at the integer t_k = ceil((k 2^e - c) / m). A runtime computes round((f a + b) s)
instead, with a float scale s, an integer f and an offset b that it may need as an integer; its stairs begin
where f a + b = (k - 1/2) / s = T_k. Both staircases agree on all reachable accumulators iff

    T_k - f t_k  <=  b  <  T_k - f (t_k - 1)        for every k that is reachable,

an interval that contains the real offset and has room, because accumulators are integers. Taking b from its
middle removes ties and keeps the runtime's float rounding away from every boundary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Relative distance that is kept from every boundary: eight float32 roundings.
MARGIN = 2.0**-21


@dataclass(frozen=True)
class Staircase:
    """The normative codes of one layer by channel; accumulators are signed so that multipliers are positive.

    Attributes:
        multiplier, constant: (channels,) int64, multiplier > 0.
        shift, low, high: as in `requantize`.
        smallest, largest: (channels,) int64 bounds of the accumulators.
    """

    multiplier: NDArray[np.int64]
    constant: NDArray[np.int64]
    shift: int
    low: int
    high: int
    smallest: NDArray[np.int64]
    largest: NDArray[np.int64]

    @property
    def offset(self) -> NDArray[np.float64]:
        """The real offset in accumulator units; the rounding term is not part of it."""
        half = 2 ** (self.shift - 1) if self.shift else 0
        return (self.constant - half) / self.multiplier

    def offsets(
        self, scale: NDArray[np.float64], factor: NDArray[np.int64], whole: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Choose b for round((f a + b) s).

        Args:
            scale: (channels,) the scales s as the runtime has them.
            factor: (channels,) the factors f.
            whole: whether b must be an integer.

        Returns:
            (channels,) offsets, and whether all reachable codes are the normative ones; where not, the offset
            is the real one, rounded if `whole`.
        """
        wanted = self.offset * factor
        lower, upper = self._interval(scale, factor)
        if whole:
            lower, upper = np.ceil(lower), np.floor(upper)
        exact: NDArray[np.bool_] = lower <= upper
        inside = exact & np.isfinite(lower) & np.isfinite(upper)
        with np.errstate(invalid="ignore"):
            middle = np.where(inside, (lower + upper) / 2, np.clip(wanted, lower, upper))
        if whole:
            middle, wanted = np.floor(middle), np.rint(wanted)
        return np.where(exact, middle, wanted), exact

    def _interval(
        self, scale: NDArray[np.float64], factor: NDArray[np.int64]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        code = np.arange(self.low + 1, self.high + 1, dtype=np.int64)[:, None]
        first = -((self.constant - code * 2**self.shift) // self.multiplier)  # t_k, rounded up
        boundary = (code - 0.5) / scale
        margin = np.abs(boundary) * MARGIN
        from_below = boundary - factor * np.maximum(first, self.smallest) + margin
        from_above = boundary - factor * np.minimum(first - 1, self.largest) - margin
        from_below = np.where(np.maximum(first, self.smallest) <= self.largest, from_below, -np.inf)
        from_above = np.where(np.minimum(first - 1, self.largest) >= self.smallest, from_above, np.inf)
        empty = np.full(scale.shape, np.inf)
        return np.max(from_below, axis=0, initial=-np.inf), np.min(from_above, axis=0, initial=empty.max())
