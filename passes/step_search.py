"""Search of a quantiser's range by the least squared rounding error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Values of a tensor that the search looks at; more change the result by less than the grid's spacing.
SEARCH_SAMPLES = 1 << 16

#: Candidates, as fractions of the largest.
SEARCH_GRID = 64


def least_squares(x: Tensor, largest: float, quantised: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The candidate with the least squared error; the larger of two equal ones is not taken.

    Args:
        x: float tensor of any shape, finite.
        largest: the largest candidate; the others are equal fractions of it.
        quantised: gives the rounded values of a (n,) float32 tensor for a candidate, shape ().
    """
    flat = x.detach().float().reshape(-1)
    sample = flat[:: max(1, flat.numel() // SEARCH_SAMPLES)]
    best, best_error = largest, float("inf")
    for index in range(1, SEARCH_GRID + 1):
        candidate = largest * index / SEARCH_GRID
        rounded = quantised(sample, torch.tensor(candidate, device=sample.device))
        error = float((rounded - sample).square_().sum(dtype=torch.float64))
        if error < best_error:
            best, best_error = candidate, error
    return best
