"""Weights at a scale per output channel that nobody trains: it follows from the weights as they are.

s = max|W| / 127 over a channel and c = round(W / s): the usual calibration of 8-bit weights. No weight is
clipped, so the gradient of the rounding is 1 everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.modes import FLOAT_BITS

from .lsq import SMALLEST_STEP
from .mode_input import Row
from .quantizers import WeightCodes, WeightQuantizer

#: Bits of the codes, and the largest one.
BITS, HIGHEST = 8, 127

#: Weights that `codes` works on at a time: float64 temporaries would be many times a large table.
PIECE = 1 << 20


def channel_scales(weight: Tensor) -> Tensor:
    """s of every entry of dimension 0, (channels,); one without weights gets the largest of the others."""
    largest = weight.detach().abs().flatten(1).amax(1)
    return (torch.where(largest > 0, largest, largest.amax()) / HIGHEST).clamp_min(SMALLEST_STEP)


def _broadcast(scales: Tensor, weight: Tensor) -> Tensor:
    return scales.reshape(-1, *[1] * (weight.dim() - 1))


def _wide(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


class _ChannelWeight(torch.autograd.Function):
    """s c, with the gradient of W; the codes come from outside, as all modes share them."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, codes: Tensor) -> Tensor:
        wide = _wide(weight)
        return (codes * _broadcast(channel_scales(wide), wide)).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class ChannelWeightQuantizer(WeightQuantizer):
    """8-bit codes at a scale per output channel, the same in every mode; it keeps nothing.

    Args:
        bits: weight bits of every mode, by row: 8, or 32 for a mode in float.
    """

    def __init__(self, bits: Sequence[int]) -> None:
        super().__init__()
        self.bits = tuple(bits)

    def initialise(self, weight: Tensor) -> None:
        """Nothing to set."""

    def forward(self, weight: Tensor, row: Row) -> Tensor:
        """s c, the shape of `weight`; the weight itself in a float mode, which no policy has."""
        if isinstance(row, int) and self.bits[row] == FLOAT_BITS:
            return weight
        return _ChannelWeight.apply(weight, self.once_per_step(_codes_of, weight))

    def codes(self, weight: Tensor, row: int) -> WeightCodes | Tensor:
        """The integers, from W in float64; the weight itself in a float mode."""
        weight = weight.detach()
        if self.bits[row] == FLOAT_BITS:
            return weight
        rows = max(1, PIECE // max(1, weight[0].numel()))
        scale = channel_scales(weight.flatten(1).abs().amax(1, keepdim=True).double())
        codes = [
            (part.double() / _broadcast(part_scale, part)).round_().to(torch.int16)
            for part, part_scale in zip(weight.split(rows), scale.split(rows), strict=True)
        ]
        return WeightCodes(torch.cat(codes), BITS, True, scale)

    def extra_repr(self) -> str:
        """Bits."""
        return f"bits={self.bits}"


def _codes_of(weight: Tensor) -> Tensor:
    wide = _wide(weight)
    return (wide / _broadcast(channel_scales(wide), wide)).round_().to(torch.int8)
