"""Element types of the integers in integer graphs."""

from __future__ import annotations

import torch

#: Integers up to here are exact in float32, and sums of them in any order.
FLOAT32_EXACT = 2**24

#: Elements that operators without sums over channels work on at a time: a piece stays in the cache, and they
#: are memory traffic, not arithmetic.
PIECE = 1 << 16


def code_dtype(low: int, high: int) -> torch.dtype:
    """The narrowest dtype that integer graphs use for values from low to high."""
    if low >= 0 and high <= 255:
        return torch.uint8
    return torch.int8 if low >= -128 and high <= 127 else torch.int32
