"""Requantisations in float32 that are exact.

One term: constants are chosen, and checked where the code changes.

    clip(floor((m * a + c) / 2^e), low, high)     and     clip(floor(fma(M, float32(a), C)), low, high)

are both functions of one integer that only rise, or only fall, as every rounding is monotone. So they are the
same function if they agree on both sides of every place where the code changes.

Several terms: a margin on both sides covers all roundings, and what it leaves open is computed in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Accumulators lie strictly within plus and minus 2^31.
LIMIT = 2**31 - 1

#: Integers of int64 arithmetic stay below this.
_WIDE = 2.0**61


def in_float32(
    factors: NDArray[np.int64], summands: NDArray[np.int64], shift: int, low: int, high: int
) -> NDArray[np.float32] | None:
    """Constants of a requantisation in float32.

    Args:
        factors: (channels,) multipliers m, at most 2^31 in magnitude.
        summands: (channels,) constants c.
        shift: e.
        low, high: clip, not below 0.

    Returns:
        (2, channels), first C, then M; None if some integer of a channel would get another code.
    """
    unit = 2.0**-shift
    if max(float(abs(summands).max(initial=0)), (high + 1) / unit) >= _WIDE:
        return None
    rises = factors != 0
    slope = np.where(rises, abs(factors), 1)
    levels = np.arange(low + 1, high + 1, dtype=np.int64)[:, None]
    # the least integer that gets a code, and the one before it
    first = -((summands - levels * 2**shift) // slope)
    exists, exists_before = rises & (first <= LIMIT), rises & (first > -LIMIT)
    first, before = np.clip(first, -LIMIT, LIMIT), np.clip(first - 1, -LIMIT, LIMIT)
    multiplier = (slope * unit).astype(np.float32)
    # products of two float32 are exact in float64; what is added to them is off by a little
    start, end = (one.astype(np.float32).astype(np.float64) * multiplier for one in (first, before))
    real = summands * unit
    above = np.where(exists, start + real - levels, np.inf).min(0, initial=np.inf)
    below = np.where(exists_before, levels - end - real, np.inf).min(0, initial=np.inf)
    both = np.isfinite(above) & np.isfinite(below)
    move = np.where(both, (np.where(both, below, 0) - np.where(both, above, 0)) / 2, 0.0)
    fixed = np.clip(summands // 2**shift, low, high) + 0.5
    constant = np.where(rises, real + move, fixed).astype(np.float32)
    added = constant.astype(np.float64)
    slack = 2.0**-50 * (np.maximum(abs(start), abs(end)) + abs(added))
    is_reached = start + added - slack >= levels
    is_missed = end + added + slack <= levels * (1 - 2.0**-23)
    if not ((is_reached | ~exists) & (is_missed | ~exists_before)).all():
        return None
    signed = np.where(rises, np.copysign(multiplier, factors), 0).astype(np.float32)
    return np.array([constant, signed])


#: Twice this is the share of values that lie so near to the boundary between two codes that they are computed
#: again, at most.
_LARGEST_MARGIN = 2.0**-8

#: Relative error of one rounding to float32.
_ROUNDING = 2.0**-24


def guarded(
    multipliers: NDArray[np.floating[Any]],
    constants: NDArray[np.floating[Any]],
    largest: NDArray[np.floating[Any]],
) -> NDArray[np.int32] | None:
    """Constants of a `specs.Guarded`.

    The float32 value is constant + sum of multiplier * float32(term), one fused step per term. The constant
    and every term and multiplier are rounded once, and every step rounds: each part of the sum is off by at
    most terms + 2 roundings of its largest magnitude, and one more when twice the margin is added.

    Args:
        multipliers: (terms, channels).
        constants: (channels,).
        largest: (channels,) magnitude of the constant and of all products together.

    Returns:
        (2 + terms + 2 * (1 + terms), channels); None if the margin would be too wide, or values do not fit
        int32.
    """
    margin = (len(multipliers) + 4) * _ROUNDING * largest
    if margin.max(initial=0.0) > _LARGEST_MARGIN or largest.max(initial=0.0) > 2.0**30:
        return None
    # where nothing is added the floor is known, and must not lie within the margin
    middle = np.where(multipliers.any(0), constants, np.floor(constants) + 0.5)
    single = np.array([middle - margin, *multipliers, 2 * margin], np.float32)
    double = np.array([constants, *multipliers], np.float64)
    rows = [single.view(np.int32).reshape(-1), double.view(np.int32).reshape(-1)]
    return np.concatenate(rows).reshape(-1, len(constants))
