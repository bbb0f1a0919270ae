"""Requantisations in float32 that are exact: constants are chosen, and checked where the code changes.

    clip(floor((m * a + c) / 2^e), low, high)     and     clip(floor(fma(M, float32(a), C)), low, high)

are both functions of one integer that only rise, or only fall, as every rounding is monotone. So they are the
same function if they agree on both sides of every place where the code changes.
"""

from __future__ import annotations

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
