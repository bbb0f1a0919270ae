"""Search of a quantiser's range by the least squared rounding error."""

from __future__ import annotations

import math
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


def clipped_at(x: Tensor, percentile: float) -> Tensor:
    """The values with magnitudes clipped at a percentile of them, 0 to 100; same shape."""
    magnitudes = x.abs().flatten()
    place = max(1, math.ceil(magnitudes.numel() * percentile / 100.0))
    bound = magnitudes.kthvalue(place).values if magnitudes.numel() else x.new_zeros(())
    return x.clamp(-bound, bound)


class Sample:
    """Values of a tensor over many batches, every n-th of all, and the smallest and the largest.

    Attributes:
        batches: how many were added.
    """

    def __init__(self) -> None:
        self.batches = 0
        self._parts: list[Tensor] = []
        self._ends: list[Tensor] = []
        self._stride = 0

    def add(self, x: Tensor) -> None:
        """Take in a batch, a tensor of any shape."""
        self.batches += 1
        flat = x.detach().reshape(-1)
        if not flat.numel():
            return
        self._stride = self._stride or max(1, flat.numel() // SEARCH_SAMPLES)
        self._parts.append(flat[:: self._stride].clone())
        while sum(part.numel() for part in self._parts) > 2 * SEARCH_SAMPLES:
            self._stride *= 2
            self._parts = [part[::2].clone() for part in self._parts]
        ends = torch.cat([flat.amin().reshape(1), flat.amax().reshape(1), *self._ends])
        self._ends = [ends.amin().reshape(1), ends.amax().reshape(1)]

    def values(self) -> Tensor:
        """All of them, flat."""
        return torch.cat([*self._parts, *(self._ends if self._stride > 1 else [])])
