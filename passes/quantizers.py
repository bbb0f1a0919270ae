"""What a scheme's quantisers look like to the rest of the library.

Every quantised tensor is `scale * (code + offset)` with an integer code and a dyadic offset
`numerator / 2**shift`, so one packed operator serves all schemes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.modes import ActiveMode, Mode


@dataclass(frozen=True)
class WeightCodes:
    """A weight as integers.

    Attributes:
        codes: int16 tensor of the weight's shape.
        bits: bits of each code.
        signed: two's complement codes if true, else unsigned.
        scale: float64 tensor, a scalar or one value per output channel.
        offset_numerator, offset_shift: the offset `numerator / 2**shift` that is added to every code.
    """

    codes: Tensor
    bits: int
    signed: bool
    scale: Tensor
    offset_numerator: int = 0
    offset_shift: int = 0


@dataclass(frozen=True)
class ActivationGrid:
    """The grid that an activation is rounded to: `scale * code`, low <= code <= high, half to even."""

    scale: float
    low: int
    high: int

    @property
    def signed(self) -> bool:
        """Whether codes can be negative."""
        return self.low < 0


class WeightQuantizer(nn.Module):
    """Base of weight quantisers; one instance per layer."""

    def forward(self, weight: Tensor, active: ActiveMode) -> Tensor:
        """Dequantised weight for training, with the scheme's straight-through gradient."""
        raise TypeError(f"{type(self).__name__} does not define forward()")

    def codes(self, weight: Tensor, mode: Mode) -> WeightCodes:
        """The weight's integers in one mode, computed in float64."""
        raise TypeError(f"{type(self).__name__} does not define codes()")

    def initialise(self, weight: Tensor) -> None:
        """Set parameters from a float weight (after construction and after loading float weights)."""
        raise TypeError(f"{type(self).__name__} does not define initialise()")


class ActivationQuantizer(nn.Module):
    """Base of activation quantisers; parameters are stacked over the modes along dimension 0.

    Attributes:
        initialised: bool buffer, one entry per mode; parameters of a mode are set from its first batch.
    """

    initialised: Tensor

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.register_buffer("initialised", torch.zeros(rows, dtype=torch.bool))

    def forward(self, x: Tensor, active: ActiveMode) -> Tensor:
        """Dequantised activation for training; initialises the mode's parameters on its first batch."""
        raise TypeError(f"{type(self).__name__} does not define forward()")

    def state_changed(self) -> None:
        """Called when buffers are about to be loaded; drops whatever was derived from them."""

    def grid(self, mode: Mode, row: int) -> ActivationGrid:
        """The integer grid of one mode."""
        raise TypeError(f"{type(self).__name__} does not define grid()")


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Identity whose gradient is multiplied by `factor`."""
    return x if factor == 1.0 else _ScaleGradient.apply(x, factor)
