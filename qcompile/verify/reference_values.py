"""Weights and grids as verification computes them by itself, in numpy float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ReferenceWeight:
    """A weight as `scale * (codes + numerator / 2**shift) + centre`.

    Attributes:
        codes: int64, the weight's shape.
        scale: float64, a scalar, one value per output channel, or per group of equal size (channels, groups).
        numerator, shift: the offset.
        centre: float64, the shape of `scale`, or 0.
        multipliers: (channels, groups) int64, what `scale`, one value per channel, is multiplied with; or 1.
    """

    codes: NDArray[np.int64]
    scale: NDArray[np.float64]
    numerator: int
    shift: int
    centre: NDArray[np.float64] | float = 0.0
    multipliers: NDArray[np.int64] | None = None

    @property
    def real(self) -> NDArray[np.float64]:
        """The dequantised weight."""
        scale = self.scale if self.multipliers is None else self.scale[:, None] * self.multipliers
        codes = self.codes.reshape(max(1, scale.size), -1) + self.numerator * 2.0**-self.shift
        centre = np.asarray(self.centre).reshape(-1, 1)
        return np.asarray(scale.reshape(-1, 1) * codes + centre).reshape(self.codes.shape)

    @property
    def integers(self) -> NDArray[np.float64]:
        """Multiples of `unit`."""
        found = np.asarray(self.codes * 2.0**self.shift + self.numerator)
        if self.multipliers is None:
            return found
        grouped = found.reshape(*self.multipliers.shape, -1) * self.multipliers[..., None]
        return np.asarray(grouped.reshape(found.shape))

    @property
    def unit(self) -> NDArray[np.float64]:
        """What one of `integers` is worth, in the shape of `scale`."""
        return np.asarray(self.scale * 2.0**-self.shift)


@dataclass(frozen=True)
class ReferenceGrid:
    """An activation as `step * code`, low <= code <= high.

    Attributes:
        step: real value of one code.
        low, high: range of codes.
        spacing: distance of the inputs at which neighbouring codes begin; None: the nearest value counts.
        start: the input at which code 0 begins, with `spacing`.
    """

    step: float
    low: int
    high: int
    spacing: float | None = None
    start: float = 0.0

    def position(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """The number whose nearest integer is the code of `x`, not clipped."""
        if self.spacing is None:
            return np.asarray(x / self.step)
        return np.asarray((x - self.start) / self.spacing - 0.5)


@dataclass(frozen=True)
class ReferenceThresholds:
    """An activation as `step * code`, the code counting the thresholds that `before * x` has reached."""

    step: float
    low: int
    high: int
    thresholds: NDArray[np.float64]
    before: float

    def position(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """A number whose nearest integer is the code of `x`: thresholds lie at halves."""
        ends, gap = self.thresholds[[0, -1]], 1.0
        if len(self.thresholds) > 1:
            gap = float(ends[1] - ends[0]) / (len(self.thresholds) - 1)
        known = np.concatenate([[ends[0] - gap], self.thresholds, [ends[1] + gap]])
        return np.interp(self.before * x, known, self.low - 0.5 + np.arange(len(known)))


@dataclass(frozen=True)
class ReferenceRange:
    """An activation of a float mode: clipped, not rounded."""

    low: float
    high: float
