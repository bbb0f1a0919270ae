"""Integer thresholds of a quantiser behind a monotone chain: batch normalisation, PReLU, learned thresholds.

N2UQ (Z. Liu et al., "Nonuniform-to-Uniform Quantization"): at deployment, what stands between the sums of one
layer and the codes of the next is a staircase over integers, one per channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .fold import Affine, Array
from .quantizers import ThresholdGrid
from .threshold_op import ALWAYS, NEVER


@dataclass(frozen=True)
class Bent:
    """prelu(base, slope) + shift, per channel or for the whole tensor.

    Attributes:
        base: one term, no pending clip.
        slope: of negative values, not negative itself.
        shift: summand.
    """

    base: Affine
    slope: Array
    shift: Array


def integer_thresholds(
    value: Affine | Bent, grid: ThresholdGrid
) -> tuple[NDArray[np.int8], NDArray[np.int32]]:
    """Thresholds on the integers of the one term of a tensor.

    Every condition `before * y >= T` is taken back through the chain: as y >= b where the chain rises, y <= b
    where it falls, b infinite where the condition always or never holds.

    Args:
        value: an affine map with one term, or its PReLU.
        grid: the quantiser.

    Returns:
        sign, shape () or (channels,), and thresholds, (levels, *shape of sign), as `threshold` takes them.
    """
    base = value.base if isinstance(value, Bent) else value
    (term,) = base.terms
    slopes, offsets = np.atleast_1d(term.coefficient), np.atleast_1d(base.constant)
    channels = max(len(slopes), len(offsets))
    if isinstance(value, Bent):
        channels = max(channels, np.size(value.slope), np.size(value.shift))
    shape = (len(grid.thresholds), channels)
    wanted = np.broadcast_to(np.asarray(grid.thresholds, np.float64)[:, None], shape)
    rising = np.full(channels, grid.before > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        bounds = _constant(0.0, wanted, rising=True) if grid.before == 0 else wanted / grid.before
        rising = rising | (grid.before == 0)
        if isinstance(value, Bent):
            bounds = _before_prelu(bounds - value.shift, np.broadcast_to(value.slope, channels), rising)
        else:
            bounds = _before_clip(bounds, base.low, base.high, rising)
        falls = slopes < 0
        moved = (bounds - offsets) / slopes
        flat = np.where(rising, _constant(offsets, bounds, True), _constant(offsets, bounds, False))
        # a factor of 0 leaves a constant: reached always or never, whatever the direction
        bounds = np.where(slopes == 0, flat, moved)
        rising = np.where(slopes == 0, True, rising ^ falls)
    reached = np.where(rising, np.ceil(bounds), -np.floor(bounds))
    integers = np.clip(reached, ALWAYS, NEVER).astype(np.int64).astype(np.int32)
    sign = np.where(rising, 1, -1).astype(np.int8)
    single = channels == 1 and all(np.ndim(one) == 0 for one in _constants(value, base))
    return (sign[0], integers[:, 0]) if single else (sign, integers)


def _constants(value: Affine | Bent, base: Affine) -> list[Array]:
    own = [value.slope, value.shift] if isinstance(value, Bent) else []
    return [base.terms[0].coefficient, base.constant, *own]


def _constant(value: Array | float, bounds: NDArray[np.float64], rising: bool) -> NDArray[np.float64]:
    """-inf where a constant satisfies the condition, which is always then, inf where it does not."""
    holds = value >= bounds if rising else value <= bounds
    return np.where(holds, -math.inf, math.inf)


def _before_prelu(
    bounds: NDArray[np.float64], slope: NDArray[np.float64], rising: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Bounds on u from bounds on prelu(u): a slope of 0 makes all negative u equal."""
    scaled = bounds / slope
    flat = -math.inf  # rising: all u reach it; falling: none does
    below = np.where(slope > 0, scaled, flat)
    return np.where(np.where(rising, bounds > 0, bounds >= 0), bounds, below)


def _before_clip(
    bounds: NDArray[np.float64], low: float, high: float, rising: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Bounds on u from bounds on clip(u, low, high)."""
    up = np.where(bounds <= low, -math.inf, np.where(bounds > high, math.inf, bounds))
    down = np.where(bounds >= high, math.inf, np.where(bounds < low, -math.inf, bounds))
    return np.where(rising, up, down)
