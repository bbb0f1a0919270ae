"""One learned step of a weight for every bit-width, all of them on one shared float weight.

Chen Tang et al., "Retraining-free Model Quantization via One-Shot Weight-Coupling Learning", Sec. 3.1, Eq. 1
and 3; the quantiser is that of S. K. Esser et al., "Learned Step Size Quantization".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .agreement import Agreement
from .lsq import SMALLEST_STEP, hold_positive
from .mode_input import Row, picked
from .quantizers import WeightCodes, WeightQuantizer
from .rounding import Bound, save_operands, saved_operands
from .step_search import SEARCH_SAMPLES, least_squares

#: The first step covers so many standard deviations around the mean.
DEVIATIONS = 3.0


def _codes(weight: Tensor, step: Tensor, limit: Bound) -> Tensor:
    """clip(round(W / s), -limit, limit - 1), ties to even; in float64, so that all agree on ties."""
    ratio = weight.double() / step.double()
    return torch.minimum(torch.maximum(ratio.round_(), -_like(limit, ratio)), _like(limit, ratio) - 1.0)


def _like(limit: Bound, other: Tensor) -> Tensor:
    return torch.as_tensor(limit, dtype=other.dtype, device=other.device)


class _LsqWeight(torch.autograd.Function):
    """s clip(round(W / s), -limit, limit - 1).

    dW = g inside the range; ds = scale sum(g (code - W / s)) inside and scale sum(g code) outside.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, limit: Bound, scale: Bound) -> Tensor:
        save_operands(ctx, weight, step, limit, scale)
        return (_codes(weight, step, limit) * step).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, step, limit, scale = saved_operands(ctx)
        wide = torch.promote_types(weight.dtype, torch.float32)
        ratio = weight.to(wide) / step
        inside = (ratio >= -limit) & (ratio <= limit - 1)
        error = _codes(weight, step, limit).to(wide) - torch.where(inside, ratio, 0.0)
        d_step = (gradients[0].to(wide) * error).sum() * scale
        return torch.where(inside, gradients[0], 0.0), d_step.to(step.dtype).reshape(step.shape), None, None


class LsqWeightQuantizer(WeightQuantizer):
    """Codes -2^(b-1) .. 2^(b-1) - 1, one step for the tensor and each bit-width.

    Args:
        bits: weight bits of every mode, by row.
        scaled_gradient: multiply the steps' gradients by 1 / sqrt(weights * highest code), as LSQ does.

    Attributes:
        widths: bit-widths that occur, increasing.
        step: (widths,) float parameter.
        places, limits, roots: (rows,) place in `step`, 2^(b-1) and 1 / sqrt(highest code), for policies.
    """

    places: Tensor
    limits: Tensor
    roots: Tensor

    def __init__(self, bits: Sequence[int], scaled_gradient: bool = True) -> None:
        super().__init__()
        self.bits, self.scaled_gradient = tuple(bits), scaled_gradient
        self.widths = tuple(sorted(set(bits)))
        self.step = nn.Parameter(torch.ones(len(self.widths)))
        self._places = [self.widths.index(one) for one in bits]
        self.register_buffer("places", torch.tensor(self._places, dtype=torch.float32), persistent=False)
        limits = torch.tensor([2.0 ** (one - 1) for one in bits])
        self.register_buffer("limits", limits, persistent=False)
        self.register_buffer("roots", (limits - 1).clamp_min(1.0).rsqrt(), persistent=False)

    @property
    def own_bits(self) -> tuple[int, ...]:
        """Those it was made for."""
        return self.bits

    def initialise(self, weight: Tensor) -> None:
        """max|mean +- 3 deviations| / 2^(b-1), as the authors' code does."""
        self.step.data = self._first_steps(weight)

    def _first_steps(self, weight: Tensor) -> Tensor:
        values = weight.detach().double()
        mean, spread = values.mean(), DEVIATIONS * values.std(correction=0)
        reach = torch.maximum((mean - spread).abs(), (mean + spread).abs())
        steps = torch.stack([reach / 2 ** (bits - 1) for bits in self.widths])
        return steps.clamp_min(SMALLEST_STEP).to(weight.dtype)

    def search(self, weight: Tensor, energy: Tensor) -> None:
        """For every bit-width the step with the least error weighed by `energy`; trained steps stay."""
        if not torch.allclose(self.step.detach(), self._first_steps(weight), rtol=1e-4, atol=0.0):
            return
        stride = max(1, weight.numel() // SEARCH_SAMPLES)
        flat = weight.detach().float().reshape(-1)[::stride]
        roots = energy.float().expand(weight.shape).reshape(-1)[::stride].sqrt()
        found = []
        for bits in self.widths:
            limit = 2.0 ** (bits - 1)

            def quantised(part: Tensor, step: Tensor, limit: float = limit) -> Tensor:
                return part + (_codes(part, step, limit) * step - part).float() * roots

            largest = float(flat.abs().amax()) / max(1.0, limit - 1)
            found.append(max(least_squares(flat, largest, quantised, Agreement()), SMALLEST_STEP))
        self.step.data = self.step.new_tensor(found)

    def forward(self, weight: Tensor, row: Row) -> Tensor:
        """Codes times the step of the mode, the shape of `weight`."""
        limit: Bound
        root: Bound
        if isinstance(row, int):
            step, limit = self.step[self._places[row]], 2.0 ** (self.bits[row] - 1)
            root = max(1.0, limit - 1) ** -0.5
        else:
            step = picked(self.step, self.places.index_select(0, row).to(torch.int64))
            limit, root = picked(self.limits, row), picked(self.roots, row)
        scale = root * weight.numel() ** -0.5 if self.scaled_gradient else 1.0
        return _LsqWeight.apply(weight, hold_positive(step), limit, scale)

    def codes(self, weight: Tensor, row: int) -> WeightCodes:
        """The mode's integers."""
        step, bits = self.step[self._places[row]].detach().clamp_min(SMALLEST_STEP), self.bits[row]
        code = _codes(weight.detach(), step, 2.0 ** (bits - 1))
        return WeightCodes(code.to(torch.int16), bits, True, step.double(), 0, 0)

    def extra_repr(self) -> str:
        """Bits."""
        return f"bits={self.bits}"
