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
from qcompile.modes import ActiveMode, Mode

from .quantizers import ActivationGrid, ActivationQuantizer

#: A step below this would divide by zero; training that pushes a step there is held at it.
SMALLEST_STEP = 1e-8


class _LsqActivation(torch.autograd.Function):
    """step * clip(round(x / step), low, high); dx = g inside the range, ds = scale * sum(g * (code - x / s))
    inside and scale * sum(g * code) outside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int, gradient_scale: float) -> Tensor:
        step = step.clamp_min(SMALLEST_STEP)
        output = (x / step).clamp_(low, high).round_().mul_(step)
        ctx.save_for_backward(x, step, output)
        ctx.low, ctx.high, ctx.gradient_scale = low, high, gradient_scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, step, output = ctx.saved_tensors
        gradient = gradients[0]
        size = float(step)
        # the fused kernel passes gradients strictly between its bounds; the range includes its ends
        smallest = torch.finfo(x.dtype).tiny
        bottom, top = ctx.low * size, ctx.high * size
        bottom -= max(abs(bottom) * torch.finfo(x.dtype).eps, smallest)
        top += max(abs(top) * torch.finfo(x.dtype).eps, smallest)
        d_x = torch.ops.aten.hardtanh_backward(gradient, x, bottom, top)
        # inside, code - x / s = (output - x) / s; outside, code = output / s
        d_step = (_dot(gradient, output) - _dot(d_x, x)) * (ctx.gradient_scale / size)
        return d_x, d_step, None, None, None


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


def _dot(a: Tensor, b: Tensor) -> Tensor:
    if a.stride() == b.stride() and a.is_contiguous(memory_format=torch.channels_last) and a.dim() == 4:
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    if a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.view(-1), b.view(-1))
    return (a * b).sum()


class LsqActivationQuantizer(ActivationQuantizer):
    """Uniform activation quantiser with one learned step per mode.

    Args:
        bits: activation bits of every mode, by row.
        signed: two's complement codes where the tensor can be negative, unsigned codes otherwise.

    Attributes:
        step: (rows,) float parameter.
    """

    def __init__(self, bits: Sequence[int], signed: bool) -> None:
        super().__init__(len(bits))
        self.bits, self.signed = tuple(bits), signed
        self.step = nn.Parameter(torch.ones(len(bits)))
        self._ready = False  # spares the buffer look-up once every row is set

    def code_range(self, row: int) -> tuple[int, int]:
        """(lowest, highest) code of a mode."""
        bits = self.bits[row]
        return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if self.signed else (0, 2**bits - 1)

    def initialise(self, x: Tensor, row: int) -> None:
        """step = max|x| / highest code, from one batch (vertical layering, Sec. 6.1).

        Raises:
            InvalidArgument: if the batch holds NaN or infinity.
        """
        largest = float(x.detach().abs().amax()) if x.numel() else 0.0
        if not math.isfinite(largest):
            raise InvalidArgument("cannot set an activation step from a batch that holds NaN or infinity")
        self.set_step(row, max(largest, SMALLEST_STEP) / max(1, self.code_range(row)[1]))

    def set_step(self, row: int, value: float) -> None:
        """Write one mode's step and mark it as initialised."""
        with torch.no_grad():
            self.step[row] = value
            self.initialised[row] = True

    def state_changed(self) -> None:
        """Look at the flags again before the next forward."""
        self._ready = False

    def forward(self, x: Tensor, active: ActiveMode) -> Tensor:
        """Round `x` (any shape) to the grid of the active mode; same shape and dtype."""
        row = active.row
        if not self._ready and not torch.compiler.is_compiling():
            if not bool(self.initialised[row]):
                self.initialise(x, row)
            self._ready = bool(self.initialised.all())
        low, high = self.code_range(row)
        per_sample = max(1, x.numel() // max(1, x.shape[0]))
        scale = active.own_gradient_scale / math.sqrt(per_sample * max(1, high))
        return _LsqActivation.apply(x, self.step[row], low, high, scale)

    def grid(self, mode: Mode, row: int) -> ActivationGrid:
        """The mode's grid; the scale is the float32 step, exactly."""
        low, high = self.code_range(row)
        return ActivationGrid(float(self.step[row].detach().clamp_min(SMALLEST_STEP)), low, high)

    def extra_repr(self) -> str:
        """Bits and sign."""
        return f"bits={self.bits}, {'signed' if self.signed else 'unsigned'}"
