"""Statistics of a batch, over all processes that train together."""

from __future__ import annotations

from torch import Tensor


class Agreement:
    """What quantisers ask when they set parameters from a batch; this one knows a single process."""

    def largest(self, value: Tensor) -> Tensor:
        """The maximum of a statistic over all ranks; infinite everywhere if it is not a number on one."""
        return value

    def total(self, value: Tensor) -> Tensor:
        """The sum of a statistic over all ranks."""
        return value

    def deviation(self, x: Tensor) -> Tensor:
        """The standard deviation of all ranks' values of a tensor, shape (), float64."""
        wide = x.detach().double()
        sums = self.total(wide.new_tensor([x.numel(), float(wide.sum()), float(wide.square().sum())]))
        mean = sums[1] / sums[0].clamp_min(1.0)
        return (sums[2] / sums[0].clamp_min(1.0) - mean.square()).clamp_min(0.0).sqrt()
