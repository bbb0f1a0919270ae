"""Requantisations in integers: products of 32 bits by 32 bits, sums of 64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: Bits of a factor besides its sign.
_BITS = 31


def in_integers(
    factors: NDArray[np.int64], summands: NDArray[np.int64], bounds: Sequence[float]
) -> tuple[tuple[int, ...], NDArray[np.int32]] | None:
    """Lifts and constants of a `specs.Shifted`.

    A multiplier that is an int32 value times a power of two leaves the latter to its term.

    Args:
        factors: (terms, channels) multipliers.
        summands: (channels,) constants, an even number of them.
        bounds: by term, its largest magnitude.

    Returns:
        Lifts by term, and (2 + terms, channels); None if a factor does not fit int32.
    """
    lifts: list[int] = []
    rows = [np.ascontiguousarray(summands[first::2]).view(np.int32) for first in (0, 1)]
    for row, bound in zip(factors, bounds, strict=True):
        lift = max(0, int(abs(row).max(initial=0)).bit_length() - _BITS)
        if (row % 2**lift).any() or bound * 2.0**lift >= 2.0**_BITS:
            return None
        lifts.append(lift)
        rows.append((row >> lift).astype(np.int32))
    return tuple(lifts), np.array(rows)


def joins_behind(
    factors: NDArray[np.int64],
    summands: NDArray[np.int64],
    bounds: Sequence[NDArray[np.float64]],
    shift: int,
) -> tuple[int, int] | None:
    """A term that can be added behind a shift.

    (sum + 2^e * term) >> shift is ((sum >> e) + term) >> (shift - e).

    Args:
        factors: (terms, channels) multipliers.
        summands: (channels,) constants.
        bounds: by term, its largest magnitude, shape () or (channels,).
        shift: of the whole sum.

    Returns:
        The term and e, or None if no term has one power of two, or what is added might leave int32.
    """
    reach = [abs(row) * bound for row, bound in zip(factors, bounds, strict=True)]
    for term, row in enumerate(factors):
        factor = int(row[0])
        exponent = factor.bit_length() - 1
        if factor <= 0 or factor != 1 << exponent or exponent > shift or (row != factor).any():
            continue
        others = abs(summands) + sum(one for index, one in enumerate(reach) if index != term)
        if float((others * 2.0**-exponent + bounds[term]).max()) < 2.0**31 - 2:
            return term, exponent
    return None
