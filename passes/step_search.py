"""Search of a quantiser's range by the least squared rounding error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .agreement import Agreement

#: Values of a tensor that the search looks at; more change the result by less than the grid's spacing.
SEARCH_SAMPLES = 1 << 16

#: Candidates, as fractions of the largest.
SEARCH_GRID = 64


def least_squares(
    x: Tensor, largest: float, quantised: Callable[[Tensor, Tensor], Tensor], agreement: Agreement
) -> float:
    """The candidate with the least squared error, the smallest of equal ones.

    Args:
        x: float tensor of any shape, finite.
        largest: the largest candidate; the others are equal fractions of it. The same on all ranks.
        quantised: gives the rounded values of a (n,) float32 tensor for a candidate, shape ().
        agreement: with the other ranks, whose errors are added.
    """
    flat = x.detach().float().reshape(-1)
    sample = flat[:: max(1, flat.numel() // SEARCH_SAMPLES)]
    candidates = [largest * index / SEARCH_GRID for index in range(1, SEARCH_GRID + 1)]
    errors = torch.stack(
        [
            (quantised(sample, sample.new_tensor(one)) - sample).square_().sum(dtype=torch.float64)
            for one in candidates
        ]
    )
    return candidates[int(agreement.total(errors).argmin())]
