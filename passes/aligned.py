"""Quantisers with aligned thresholds: floor codes, so that low bits can be dropped at any time.

Kunyuan Du et al., "From Quantized DNNs to Quantizable DNNs", Sec. 2.1 and 3.5, on the base of DoReFa-Net:
c_b = clamp(floor(2^b r), 0, 2^b - 1) for r in [0, 1]. Thresholds lie at multiples of 2^-b, and those of fewer
bits are among those of more, hence c_b = c_K >> (K - b). Rounding half to even would break that at ties.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import InvalidArgument
from qcompile.modes import ActiveMode

from .agreement import Agreement
from .cpu_gradients import has_kernels, within
from .mode_input import Row, picked
from .quantizers import ActivationGrid, ActivationQuantizer, FloatRange, WeightCodes, WeightQuantizer
from .rounding import Again, Bound, Rounding, save_operands, saved_operands, with_note
from .step_search import least_squares

#: What `bits` of a float mode are.
FLOAT_BITS = 32

#: No weight is divided by less; only a weight of zeros comes near.
SMALLEST_RANGE = 1e-12


def floor_code(ratio: Tensor, bits: int) -> Tensor:
    """clamp(floor(2^b r), 0, 2^b - 1) (Eq. 7); the shape of `ratio`."""
    return torch.floor(ratio * 2.0**bits).clamp_(0, 2**bits - 1)


def tanh_range(weight: Tensor, deviations: float | None = None) -> Tensor:
    """max |tanh W|, or at most so many root mean squares of tanh W; shape (), a constant for gradients."""
    squashed = torch.tanh(weight.detach())
    largest = squashed.abs().amax()
    if deviations is not None:
        largest = torch.minimum(largest, deviations * squashed.square().mean().sqrt())
    return largest.clamp_min(SMALLEST_RANGE)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _AlignedWeight(torch.autograd.Function):
    """2 c_b / (2^b - 1) - 1 from the highest code, or 2 r - 1 where there is none; dq/dr = 1.

    dW = g (1 - tanh(W)^2) / max|tanh W|, also for what a smaller range than the maximum clips.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        highest: Tensor | None,
        power: Bound,
        levels: Bound,
        deviations: float | None,
    ) -> Tensor:
        save_operands(ctx, weight)
        ctx.deviations = deviations
        if highest is None:
            wide = _wide(weight)
            return (torch.tanh(wide) / tanh_range(wide, deviations)).clamp_(-1.0, 1.0).to(weight.dtype)
        return (torch.floor(highest.to(weight.dtype) / power) * 2.0) / levels - 1.0

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = saved_operands(ctx)
        wide = _wide(weight)
        slope = (1.0 - torch.tanh(wide).square()) / tanh_range(wide, ctx.deviations)
        return gradients[0] * slope.to(weight.dtype), None, None, None, None


class AlignedWeightQuantizer(WeightQuantizer):
    """Nested floor codes of one tanh-normalised weight, r = tanh(W) / (2 max|tanh W|) + 1/2.

    Args:
        bits: weight bits of every mode, by row; 32 for a mode in float.
        deviations: r is clipped to [0, 1] after division by so many root mean squares of tanh W instead of
            the maximum, where they are less; None for the maximum, as in the paper.

    Attributes:
        powers, levels: (rows,) 2^(K - b) and 2^b - 1, for the rows of policies.
    """

    powers: Tensor
    levels: Tensor

    def __init__(self, bits: Sequence[int], deviations: float | None = None) -> None:
        super().__init__()
        self.bits, self.deviations = tuple(bits), deviations
        self.highest_bits = max((one for one in bits if one != FLOAT_BITS), default=0)
        numbers = torch.tensor([self._numbers(row) for row in range(len(bits))])
        self.register_buffer("powers", numbers[:, 0].clone(), persistent=False)
        self.register_buffer("levels", numbers[:, 1].clone(), persistent=False)

    def _numbers(self, row: int) -> tuple[float, float]:
        bits = self.bits[row]
        return (1.0, 1.0) if bits == FLOAT_BITS else (2.0 ** (self.highest_bits - bits), 2.0**bits - 1.0)

    def initialise(self, weight: Tensor) -> None:
        """Nothing to set."""

    def forward(self, weight: Tensor, row: Row) -> Tensor:
        """2 c_b / (2^b - 1) - 1, the shape of `weight`; 2 r - 1 in a float mode."""
        power: Bound
        levels: Bound
        if not isinstance(row, int):
            power, levels = picked(self.powers, row), picked(self.levels, row)
        elif self.bits[row] == FLOAT_BITS:
            return _AlignedWeight.apply(weight, None, 1.0, 1.0, self.deviations)
        else:
            power, levels = self._numbers(row)
        highest = self.once_per_step(self._highest, weight)
        return _AlignedWeight.apply(weight, highest, power, levels, self.deviations)

    def _highest(self, weight: Tensor) -> Tensor:
        wide = _wide(weight)
        ratio = torch.tanh(wide) / (2.0 * tanh_range(wide, self.deviations)) + 0.5
        return floor_code(ratio, self.highest_bits).to(torch.uint8)

    def codes(self, weight: Tensor, row: int) -> WeightCodes | Tensor:
        """The mode's integers, from W in float64.

        The unsigned code c with offset -(2^b - 1) / 2 is the two's complement code c - 2^(b-1) with offset
        1/2: the same bits but for the first, which is inverted.
        """
        wide = weight.detach().double()
        ratio = (torch.tanh(wide) / (2.0 * tanh_range(wide, self.deviations)) + 0.5).clamp_(0.0, 1.0)
        bits = self.bits[row]
        if bits == FLOAT_BITS:
            return 2.0 * ratio - 1.0
        code = torch.floor(floor_code(ratio, self.highest_bits) / 2.0 ** (self.highest_bits - bits))
        signed = (code - 2 ** (bits - 1)).to(torch.int16)
        return WeightCodes(signed, bits, True, wide.new_tensor(2.0 / (2**bits - 1)), 1, 1)

    def extra_repr(self) -> str:
        """Bits."""
        return f"bits={self.bits}"


def floored(x: Tensor, size: Tensor, cells: Bound, levels: Bound) -> Tensor:
    """s min(floor(2^b clip(x / s, 0, 1)), 2^b - 1) / (2^b - 1), in the dtype of `x`.

    Args:
        x: tensor of any shape.
        size: s, shape ().
        cells, levels: 2^b and 2^b - 1.
    """
    wide = _wide(x)
    ratio = (wide / size.to(wide.dtype)).clamp_(0.0, 1.0)
    code = torch.minimum(
        ratio.mul_(cells).floor_(), torch.as_tensor(levels, dtype=wide.dtype, device=x.device)
    )
    return code.mul_(size / levels).to(x.dtype)


class _AlignedActivation(torch.autograd.Function):
    """`floored`; the gradient passes within [0, s]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: Tensor, cells: Bound, levels: Bound, again: Again) -> Tensor:
        ctx.again = again
        save_operands(ctx, x, size)
        return floored(x, size, cells, levels)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, size = saved_operands(ctx)
        if not torch.compiler.is_compiling():
            ctx.again.drop()
            if has_kernels(x):
                return within(gradients[0], x, 0.0, float(size)), None, None, None, None
        return torch.where((x >= 0) & (x <= size), gradients[0], 0.0), None, None, None, None


class AlignedActivationQuantizer(ActivationQuantizer):
    """Floor codes of clip(x, 0, s), without learned parameters; negative inputs get code 0.

    Args:
        bits: activation bits of every mode, by row; 32 for a mode in float.
        from_data: s comes from the first batch, else it is 1 as in the paper.

    Attributes:
        size: (1,) float buffer, s; one for all modes, whose codes would not nest otherwise.
        cells, levels: (rows,) 2^b and 2^b - 1, for the rows of policies.
    """

    size: Tensor
    cells: Tensor
    levels: Tensor

    def __init__(self, bits: Sequence[int], from_data: bool = False) -> None:
        super().__init__(len(bits))
        self.bits, self.from_data = tuple(bits), from_data
        self.register_buffer("size", torch.ones(1))
        numbers = torch.tensor([self._numbers(row) for row in range(len(bits))])
        self.register_buffer("cells", numbers[:, 0].clone(), persistent=False)
        self.register_buffer("levels", numbers[:, 1].clone(), persistent=False)
        self.initialised.fill_(not from_data)

    def _numbers(self, row: int) -> tuple[float, float]:
        bits = self.bits[row]
        return (1.0, 1.0) if bits == FLOAT_BITS else (2.0**bits, 2.0**bits - 1.0)

    def initialise(self, x: Tensor, row: int, agreement: Agreement) -> None:
        """The geometric mean, over the modes, of the range with the least squared error.

        Few bits want a small range and many a large one, and codes nest only within a common one.

        Raises:
            InvalidArgument: if the batch holds NaN or infinity.
        """
        highest = x.detach().amax().clamp_min(0.0).float() if x.numel() else x.new_zeros(())
        largest = float(agreement.largest(highest))
        if not math.isfinite(largest):
            raise InvalidArgument("cannot set an activation range from a batch that holds NaN or infinity")
        exponent = 0.0
        if largest > 0.0:
            widths = [one for one in dict.fromkeys(self.bits) if one != FLOAT_BITS]
            for bits in widths:
                values = partial(floored, cells=2.0**bits, levels=2.0**bits - 1.0)
                exponent += math.log(least_squares(x, largest, values, agreement)) / len(widths)
        with torch.no_grad():
            self.size.fill_(math.exp(exponent))
            self.initialised.fill_(True)

    def forget(self) -> None:
        """Let the next batch set the range anew, if it comes from data."""
        self.initialised.fill_(not self.from_data)

    def forward(self, x: Tensor, active: ActiveMode) -> Tensor:
        """Floor `x` (any shape) to the grid of the active mode; same shape and dtype."""
        row = active.row_of(self.slot)
        size = self.size.squeeze(0)
        cells: Bound
        levels: Bound
        if not isinstance(row, int):
            cells, levels = picked(self.cells, row), picked(self.levels, row)
        elif self.bits[row] == FLOAT_BITS:
            limit = size.to(x.dtype)  # the ends have the gradient of the inside, which clamp may not give
            outside = torch.minimum(x.detach().clamp_min(0.0), limit)
            return torch.where((x >= 0.0) & (x <= limit), x, outside)
        else:
            cells, levels = self._numbers(row)
        again = Again()
        output = _AlignedActivation.apply(x, size, cells, levels, again)
        return with_note(output, Rounding(floored, (x, size, cells, levels), again))

    def grid(self, row: int) -> ActivationGrid | FloatRange:
        """The mode's grid: thresholds s k / 2^b, values s k / (2^b - 1)."""
        size, bits = float(self.size[0]), self.bits[row]
        if bits == FLOAT_BITS:
            return FloatRange(0.0, size)
        return ActivationGrid(size / (2**bits - 1), 0, 2**bits - 1, spacing=size / 2**bits)

    def extra_repr(self) -> str:
        """Bits."""
        return f"bits={self.bits}"
