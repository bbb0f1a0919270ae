"""Weights of more than 8 bits as sums of int8 weights, for kernels that multiply bytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Effective weights of 8-bit codes, 2 * code + 1, reach +-255.
MOST_PARTS = 3


def count_parts(weight: NDArray[np.integer]) -> int:
    """How many int8 weights of one shape sum up to this integer weight; more than MOST_PARTS do not count."""
    parts = 1
    while parts <= MOST_PARTS and (weight.min() < -128 * parts or weight.max() > 127 * parts):
        parts += 1
    return parts


def int8_parts(weight: NDArray[np.integer], parts: int) -> list[NDArray[np.int8]]:
    """`parts` int8 tensors, as equal as integers can be, whose sum is the weight; all of its shape."""
    return [((weight.astype(np.int64) + index) // parts).astype(np.int8) for index in range(parts)]
