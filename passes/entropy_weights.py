"""Weights spread evenly over their levels, by a scale per output channel.

Zechun Liu et al., "Nonuniform-to-Uniform Quantization", Sec. 3.4: dividing a filter by alpha, which is
(2^b - 1) / 2^(b-1) mean|W|, makes all levels of a uniform quantiser on [-1, 1] about equally likely, which
preserves most entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .mode_input import Row, picked
from .quantizers import WeightCodes, WeightQuantizer

#: No weight is divided by less; only a filter of zeros comes near.
SMALLEST_SCALE = 1e-12


def filter_means(weight: Tensor) -> Tensor:
    """mean|W| of every output channel, shaped to broadcast; a constant for gradients."""
    means = weight.detach().abs().flatten(1).mean(1)
    return means.clamp_min(SMALLEST_SCALE).reshape(-1, *([1] * (weight.dim() - 1)))


def tanh_ratio(weight: Tensor) -> Tensor:
    """tanh(W) / max|tanh W|, the maximum a constant for gradients."""
    squashed = torch.tanh(weight)
    return squashed / squashed.detach().abs().amax().clamp_min(SMALLEST_SCALE)


def _level(ratio: Tensor, levels: Any) -> Tensor:
    """The nearest of 0 .. `levels` for a ratio within [-1, 1]; overwrites it.

    In float64, in training as in conversion: weights of one magnitude, such as those of a binary network, lie
    on ties, which float32 would break by its rounding.
    """
    return ratio.clamp_(-1.0, 1.0).add_(1.0).mul_(levels / 2.0).round_()


class _RoundLevels(torch.autograd.Function):
    """alpha times the uniform levels on [-1, 1] of clip(W / alpha, -1, 1), half to even.

    dW = g, unmasked, or g / alpha.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, alpha: Any, levels: Any, divide: bool) -> Tensor:
        if divide:
            ctx.save_for_backward(alpha.to(weight.dtype))
        return (_level(weight.double() / alpha, levels) * (2.0 / levels) - 1.0).mul_(alpha).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        given = gradients[0]
        for alpha in ctx.saved_tensors:
            given = given / alpha
        return given, None, None, None


class EntropyWeightQuantizer(WeightQuantizer):
    """Unsigned codes of W / alpha, every mode on its own.

    Args:
        bits: weight bits of every mode, by row.
        rescale: divide by alpha and multiply it back; without, tanh(W) / max|tanh W| is quantised, as in
            DoReFa-Net, the paper's ablation (Table 3).
        divide_gradient: divide the gradient by alpha.

    Attributes:
        levels: (rows,) 2^b - 1, for the rows of policies.
    """

    levels: Tensor

    def __init__(self, bits: Sequence[int], rescale: bool = True, divide_gradient: bool = False) -> None:
        super().__init__()
        self.bits, self.rescale, self.divide_gradient = tuple(bits), rescale, divide_gradient
        self.register_buffer("levels", torch.tensor([2.0**b - 1.0 for b in bits]), persistent=False)

    def initialise(self, weight: Tensor) -> None:
        """Nothing to set."""

    def _alpha(self, weight: Tensor, levels: Any) -> Tensor:
        # 2^(b-1) = (2^b - 1 + 1) / 2
        return filter_means(weight) * (levels / ((levels + 1.0) / 2.0))

    def forward(self, weight: Tensor, row: Row) -> Tensor:
        """alpha (2 c / (2^b - 1) - 1), the shape of `weight`."""
        levels: Any = 2.0 ** self.bits[row] - 1.0 if isinstance(row, int) else picked(self.levels, row)
        if not self.rescale:
            return _RoundLevels.apply(tanh_ratio(weight.double()), 1.0, levels, False).to(weight.dtype)
        return _RoundLevels.apply(weight, self._alpha(weight.double(), levels), levels, self.divide_gradient)

    def codes(self, weight: Tensor, row: int) -> WeightCodes:
        """The mode's integers, from W in float64, in two's complement as those of `aligned`."""
        wide, bits = weight.detach().double(), self.bits[row]
        levels = 2**bits - 1
        alpha = self._alpha(wide, float(levels)) if self.rescale else wide.new_ones(())
        ratio = wide / alpha if self.rescale else tanh_ratio(wide)
        code = _level(ratio, levels) - 2 ** (bits - 1)
        scale = alpha.reshape(-1) if self.rescale else alpha
        return WeightCodes(code.to(torch.int16), bits, True, scale * (2.0 / levels), 1, 1)

    def extra_repr(self) -> str:
        """Bits."""
        return f"bits={self.bits}, rescale={self.rescale}"
