"""Quantisers with learned lower and upper bounds, for weights and activations.

MBQuant, Eq. 1: r = clip((x - l) / (u - l), 0, 1) is rounded to 2^b - 1 equal parts; weights stand for
2 r - 1, activations for r. The gradient of the rounding is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.errors import InvalidArgument
from qcompile.modes import ActiveMode

from .agreement import Agreement
from .cpu_gradients import dot, has_kernels, within
from .mode_input import Row, picked
from .quantizers import (
    ActivationGrid,
    ActivationQuantizer,
    WeightCodes,
    WeightQuantizer,
    scale_gradient,
    write_row,
)
from .rounding import Again, Bound, Rounding, save_operands, saved_operands, with_note

#: Bounds are held at least this far apart.
SMALLEST_WIDTH = 1e-6


def in_parts(x: Tensor, lower: Tensor, upper: Tensor, parts: Bound, low: float, width: float) -> Tensor:
    """low + width * round(parts * clip((x - l) / (u - l), 0, 1)) / parts, in the dtype of `x`.

    Args:
        x: tensor of any shape.
        lower, upper: l and u, shape ().
        parts: 2^b - 1.
        low, width: the values that r = 0 and the whole range stand for.
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    lower = lower.to(wide.dtype)
    ratio = (wide - lower).div_(upper.to(wide.dtype) - lower).clamp_(0.0, 1.0)
    values = ratio.mul_(parts).round_().mul_(width / parts)
    return (values.add_(low) if low else values).to(x.dtype)


class _InParts(torch.autograd.Function):
    """`in_parts`; inside the bounds dr/dx = 1 / (u - l), dr/dl = (r - 1) / (u - l), dr/du = -r / (u - l)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lower: Tensor,
        upper: Tensor,
        parts: Bound,
        low: float,
        width: float,
        again: Again,
    ) -> Tensor:
        ctx.again, ctx.width = again, width
        save_operands(ctx, x, lower, upper)
        return in_parts(x, lower, upper, parts, low, width)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, lower, upper = saved_operands(ctx)
        if not torch.compiler.is_compiling():
            ctx.again.drop()
            if has_kernels(x) and lower.dtype == x.dtype:
                return (*_gradients_on_cpu(gradients[0], x, lower, upper, ctx.width), None, None, None, None)
        wide = torch.promote_types(x.dtype, torch.float32)
        distance = (upper - lower).to(wide)
        ratio = (x.to(wide) - lower.to(wide)) / distance
        inside = (ratio >= 0) & (ratio <= 1)
        scaled = torch.where(inside, gradients[0].to(wide), 0.0) * (ctx.width / distance)
        along = (scaled * ratio).sum()
        d_lower, d_upper = along - scaled.sum(), -along
        return scaled.to(x.dtype), d_lower.to(lower.dtype), d_upper.to(upper.dtype), None, None, None, None


def _gradients_on_cpu(
    gradient: Tensor, x: Tensor, lower: Tensor, upper: Tensor, width: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in four passes over the tensors instead of ten."""
    bottom, top = float(lower), float(upper)
    scaled = within(gradient, x, bottom, top).mul_(width / (top - bottom))
    total = scaled.sum()
    along = (dot(scaled, x) - bottom * total) / (top - bottom)
    return scaled, along - total, -along


def held_apart(lower: Tensor, upper: Tensor) -> Tensor:
    """u, at least `SMALLEST_WIDTH` above l; gradients pass, so that bounds can part again."""
    return upper + (lower + SMALLEST_WIDTH - upper).detach().clamp_min(0.0)


class RangeWeightQuantizer(WeightQuantizer):
    """Equal parts between two learned bounds, the same codes in every mode.

    Args:
        bits: of the codes.
        deviations: the bounds start at so many standard deviations to both sides of zero.

    Attributes:
        lower, upper: (1,) float parameters.
    """

    def __init__(self, bits: int, deviations: float = 3.0) -> None:
        super().__init__()
        self.bits, self.deviations = bits, deviations
        self.lower, self.upper = nn.Parameter(-torch.ones(1)), nn.Parameter(torch.ones(1))

    def initialise(self, weight: Tensor) -> None:
        """Set the bounds from the weights' standard deviation."""
        reach = self.deviations * weight.detach().float().std(correction=0).clamp_min(SMALLEST_WIDTH)
        with torch.no_grad():
            self.lower.data = -reach.to(weight.dtype).reshape(1)
            self.upper.data = reach.to(weight.dtype).reshape(1)

    def forward(self, weight: Tensor, row: Row) -> Tensor:
        """2 c / (2^b - 1) - 1, the shape of `weight`."""
        lower = self.lower.squeeze(0)
        upper = held_apart(lower, self.upper.squeeze(0))
        return _InParts.apply(weight, lower, upper, 2.0**self.bits - 1.0, -1.0, 2.0, Again())

    def codes(self, weight: Tensor, row: int) -> WeightCodes:
        """The integers, from W, l and u in float64, in two's complement as those of `aligned`."""
        parts = 2**self.bits - 1
        lower = self.lower.detach().double().squeeze(0)
        upper = held_apart(lower, self.upper.detach().double().squeeze(0))
        ratio = ((weight.detach().double() - lower) / (upper - lower)).clamp_(0.0, 1.0)
        code = (ratio * parts).round_() - 2 ** (self.bits - 1)
        return WeightCodes(code.to(torch.int16), self.bits, True, ratio.new_tensor(2.0 / parts), 1, 1)

    def extra_repr(self) -> str:
        """Bits."""
        return f"bits={self.bits}"


class RangeActivationQuantizer(ActivationQuantizer):
    """Equal parts between two learned bounds per mode, values from 0 to 1.

    Args:
        bits: activation bits of every mode, by row.
        deviations: the upper bound starts at so many standard deviations.

    Attributes:
        lower, upper: (rows,) float parameters.
        parts: (rows,) 2^b - 1, for the rows of policies.
    """

    parts: Tensor

    def __init__(self, bits: Sequence[int], deviations: float = 3.0) -> None:
        super().__init__(len(bits))
        self.bits, self.deviations = tuple(bits), deviations
        self.lower = nn.Parameter(torch.zeros(len(bits)))
        self.upper = nn.Parameter(torch.ones(len(bits)))
        self.register_buffer("parts", torch.tensor([2.0**b - 1.0 for b in bits]), persistent=False)

    def initialise(self, x: Tensor, row: int, agreement: Agreement) -> None:
        """l = min x, u = 3 sigma / sqrt(1 - 2 / pi), with `deviations` for 3.

        The standard deviation of a rectified normal variable's absolute value is sqrt(1 - 2 / pi) of that of
        the variable.

        Raises:
            InvalidArgument: if the batch holds NaN or infinity.
        """
        wide = x.detach().float() if x.numel() else x.new_zeros(1, dtype=torch.float32)
        lower = -float(agreement.largest(-wide.amin()))
        upper = self.deviations / math.sqrt(1.0 - 2.0 / math.pi) * float(agreement.deviation(x))
        if not (math.isfinite(lower) and math.isfinite(upper)):
            raise InvalidArgument("cannot set activation bounds from a batch that holds NaN or infinity")
        write_row(self.lower, row, lower)
        write_row(self.upper, row, max(upper, lower + SMALLEST_WIDTH))
        self.initialised[row] = True

    def forget(self) -> None:
        """Let the next batch set the bounds anew."""
        super().forget()
        with torch.no_grad():
            self.lower.zero_()
            self.upper.fill_(1.0)

    def forward(self, x: Tensor, active: ActiveMode) -> Tensor:
        """Round `x` (any shape) to the parts of the active mode; same shape and dtype."""
        row, own = active.row_of(self.slot), active.own_gradient_scale
        lower, upper = (scale_gradient(picked(one, row), own) for one in (self.lower, self.upper))
        upper = held_apart(lower, upper)
        parts: Bound = 2.0 ** self.bits[row] - 1.0 if isinstance(row, int) else picked(self.parts, row)
        again = Again()
        output = _InParts.apply(x, lower, upper, parts, 0.0, 1.0, again)
        return with_note(output, Rounding(in_parts, (x, lower, upper, parts, 0.0, 1.0), again))

    def grid(self, row: int) -> ActivationGrid:
        """The mode's grid: code k from l + (k - 1/2) (u - l) / (2^b - 1) on, for k / (2^b - 1)."""
        parts = 2 ** self.bits[row] - 1
        lower = self.lower[row].detach().double()
        spacing = float(held_apart(lower, self.upper[row].detach().double()) - lower) / parts
        return ActivationGrid(1.0 / parts, 0, parts, spacing, float(lower) - spacing / 2)

    def extra_repr(self) -> str:
        """Bits."""
        return f"bits={self.bits}"
