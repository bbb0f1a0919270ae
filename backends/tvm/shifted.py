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
