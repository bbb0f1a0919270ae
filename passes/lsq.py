"""Learned step size quantisation of activations, one step per mode.

S. K. Esser et al., "Learned Step Size Quantization": the step is a parameter; its gradient is scaled by
1 / sqrt(values per sample * highest code).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.errors import InvalidArgument
from qcompile.modes import FLOAT_BITS, ActiveMode

from .agreement import Agreement
from .cpu_gradients import dot, has_kernels, within
from .mode_input import picked
from .quantizers import ActivationGrid, ActivationQuantizer, FloatRange, write_row
from .rounding import Again, Bound, Rounding, rounded, save_operands, saved_operands, with_note
from .step_search import least_squares

#: A step below this would divide by zero; training that pushes a step there is held at it.
SMALLEST_STEP = 1e-8


class _LsqActivation(torch.autograd.Function):
    """step * clip(round(x / step), low, high); dx = g inside the range, ds = scale * sum(g * (code - x / s))
    inside and scale * sum(g * code) outside. Saves x, which whatever made it has mostly saved already."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, low: Bound, high: Bound, gradient_scale: Bound, again: Again
    ) -> Tensor:
        ctx.again = again
        save_operands(ctx, x, step, low, high, gradient_scale)
        return rounded(x, step, low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, step, low, high, gradient_scale = saved_operands(ctx)
        uniform = not isinstance(low, Tensor)
        if uniform and has_kernels(x) and not torch.compiler.is_compiling():
            output = ctx.again.take(rounded, x, step, low, high)
            d_x, d_step = _backward_fused(gradients[0], x, output, float(step), low, high)
        else:
            if not torch.compiler.is_compiling():
                ctx.again.drop()
            d_x, d_step = _backward(gradients[0], x, step, low, high)
        # the size enters here: with an open one it is no plain number that a forward could take
        scale = gradient_scale * math.prod(x.shape[1:]) ** -0.5
        return d_x, (d_step * scale).to(step.dtype), None, None, None, None


def _backward(gradient: Tensor, x: Tensor, step: Tensor, low: Any, high: Any) -> tuple[Tensor, Tensor]:
    """Gradients of x and, unscaled, of the step; sums in single precision, as half types would overflow."""
    wide = torch.promote_types(x.dtype, torch.float32)
    ratio = x.to(wide) / step
    inside = (ratio >= low) & (ratio <= high)
    error = ratio.clamp(low, high).round() - torch.where(inside, ratio, 0.0)
    return torch.where(inside, gradient, 0.0), (gradient.to(wide) * error).sum()


def _backward_fused(
    gradient: Tensor, x: Tensor, output: Tensor, size: float, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """The same in three passes over the tensors instead of ten."""
    d_x = within(gradient, x, low * size, high * size)
    # inside, code - x / s = (output - x) / s; outside, code = output / s
    return d_x, (dot(gradient, output) - dot(d_x, x)) / size


class _HoldPositive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Tensor) -> Tensor:
        return step.clamp_min(SMALLEST_STEP)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def hold_positive(step: Tensor) -> Tensor:
    """The step, at least `SMALLEST_STEP`; the gradient passes so that a step can recover."""
    return _HoldPositive.apply(step)


def least_squares_step(x: Tensor, low: int, high: int) -> float:
    """The step with the least squared rounding error, among fractions of the one that covers max|x|.

    Args:
        x: float tensor of any shape, finite.
        low, high: range of codes.
    """
    largest = float(x.detach().abs().max()) if x.numel() else 0.0
    if largest == 0.0:
        return SMALLEST_STEP
    found = least_squares(
        x, largest / max(1, high), lambda part, step: rounded(part, step, low, high), Agreement()
    )
    return max(found, SMALLEST_STEP)


class LsqActivationQuantizer(ActivationQuantizer):
    """Uniform activation quantiser with one learned step per mode.

    Args:
        bits: activation bits of every mode, by row; 32 for a mode that leaves activations in float.
        signed: two's complement codes where the tensor can be negative, unsigned codes otherwise.

    Attributes:
        step: (rows,) float parameter.
        lows, highs: (rows,) lowest and highest codes, for the rows of policies.
    """

    lows: Tensor
    highs: Tensor

    def __init__(self, bits: Sequence[int], signed: bool) -> None:
        super().__init__(len(bits))
        self.bits, self.signed = tuple(bits), signed
        self.step = nn.Parameter(torch.ones(len(bits)))
        ranges = torch.tensor([self.code_range(row) for row in range(len(bits))], dtype=torch.float32)
        self.register_buffer("lows", ranges[:, 0].clone(), persistent=False)
        self.register_buffer("highs", ranges[:, 1].clone(), persistent=False)
        self._mark_float_rows()

    def _mark_float_rows(self) -> None:
        for row, bits in enumerate(self.bits):
            if bits == FLOAT_BITS:
                self.initialised[row] = True

    def code_range(self, row: int) -> tuple[int, int]:
        """(lowest, highest) code of a mode."""
        bits = self.bits[row]
        return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if self.signed else (0, 2**bits - 1)

    def initialise(self, x: Tensor, row: int, agreement: Agreement) -> None:
        """step = max|x| / highest code, from one batch (vertical layering, Sec. 6.1).

        Raises:
            InvalidArgument: if the batch holds NaN or infinity.
        """
        # amax passes NaN on
        largest = float(agreement.largest(x.detach().abs().amax().float() if x.numel() else x.new_zeros(())))
        if not math.isfinite(largest):
            raise InvalidArgument("cannot set an activation step from a batch that holds NaN or infinity")
        self.set_step(row, max(largest, SMALLEST_STEP) / max(1, self.code_range(row)[1]))

    def search(self, x: Tensor, row: int) -> None:
        """The step with the least squared rounding error, among fractions of the one that covers max|x|."""
        self.set_step(row, least_squares_step(x, *self.code_range(row)))

    def forget(self) -> None:
        """Let the next batch set all steps anew."""
        super().forget()
        with torch.no_grad():
            self.step.fill_(1.0)
        self._mark_float_rows()

    def set_step(self, row: int, value: float) -> None:
        """Write one mode's step and mark it as initialised."""
        write_row(self.step, row, value)
        self.initialised[row] = True

    def forward(self, x: Tensor, active: ActiveMode) -> Tensor:
        """Round `x` (any shape) to the grid of the active mode; same shape and dtype."""
        row = active.row_of(self.slot)
        low: Bound
        high: Bound
        if isinstance(row, int):
            if self.bits[row] == FLOAT_BITS:
                return x
            low, high = self.code_range(row)
            root: Bound = max(1, high) ** -0.5
        else:
            low, high = picked(self.lows, row), picked(self.highs, row)
            root = torch.rsqrt(high.clamp_min(1.0))
        scale = active.own_gradient_scale * root
        step = hold_positive(picked(self.step, row))
        again = Again()
        output = _LsqActivation.apply(x, step, low, high, scale, again)
        return with_note(output, Rounding(rounded, (x, step, low, high), again))

    def grid(self, row: int) -> ActivationGrid | FloatRange:
        """The mode's grid; the scale is the float32 step, exactly."""
        if self.bits[row] == FLOAT_BITS:
            return FloatRange()
        low, high = self.code_range(row)
        return ActivationGrid(float(self.step[row].detach().clamp_min(SMALLEST_STEP)), low, high)

    def extra_repr(self) -> str:
        """Bits and sign."""
        return f"bits={self.bits}, {'signed' if self.signed else 'unsigned'}"
