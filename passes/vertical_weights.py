"""Nested floor codes of one weight: a mode's code is a prefix of the highest mode's.

Vertical layering, Sec. 3.1 and 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .code_types import PIECE
from .lsq import SMALLEST_STEP, hold_positive
from .mode_input import Row, picked
from .quantizers import WeightCodes, WeightQuantizer
from .rounding import Bound, save_operands, saved_operands

if TYPE_CHECKING:
    from .schemes.vertical import VerticalConfig

#: In modes that multiply codes, the steps of a channel's groups are at most so many times one unit: with
#: codes of up to 4 bits, what is multiplied is a byte.
MOST_MULTIPLES = 15

#: Steps that a search tries, as parts of the one that covers all weights.
PARTS = tuple(2.0 ** (-index / 4) for index in range(20))

#: Where a group's codes may lie around, as parts of the middle between its ends.
CENTRES = (0.0, 0.5, 1.0)

#: What improves the best of those, again and again: moves, in codes of the lowest mode, and other steps.
MOVES = (-0.375, -0.25, -0.125, 0.125, 0.25, 0.375)
STRETCHES = (0.92, 0.95, 0.98, 1.02, 1.05, 1.08)
REFINEMENTS = 2


def highest_code(weight: Tensor, step: Tensor, highest_bits: int) -> Tensor:
    """c_K = clip(round(W / s), -2^(K-1), 2^(K-1) - 1), ties to even; the shape of `weight`."""
    limit = 2 ** (highest_bits - 1)
    if weight.dtype in (torch.float16, torch.bfloat16):  # their own quotients would move weights over ties
        weight, step = weight.float(), step.float()
    return torch.clamp(torch.round(weight / step), -limit, limit - 1)


def lower_code(highest: Tensor, dropped_bits: int) -> Tensor:
    """c_b = floor(c_K / 2^d) (Eq. 5 applied d times)."""
    return torch.floor(highest * 2.0**-dropped_bits)


def compensation(dropped_bits: int) -> tuple[int, int]:
    """z_b = (1 - 2^-d) / 2 as (numerator, shift): numerator / 2^shift."""
    return (2**dropped_bits - 1, dropped_bits + 1) if dropped_bits else (0, 0)


class _VerticalWeight(torch.autograd.Function):
    """Dequantised weight s_b (c_b + z_b), straight-through backward.

    dW = g inside the K-bit clip range, one mask for all modes. ds = g_s 2^d sum(g e) with
    e = c_b + z_b - W / s_b inside and c_b + z_b outside, g_s the LSQ gradient scale of the highest mode.
    Saves the parameters and c_K in int8, which all modes share.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        step: Tensor,
        highest: Tensor,
        power: Bound,
        z: Bound,
        printed: bool,
        top: int,
    ) -> Tensor:
        save_operands(ctx, weight, step, highest, power, z)
        ctx.printed, ctx.top = printed, top
        return (torch.floor(highest.to(weight.dtype) / power) + z) * (step * power)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, step, highest, power, z = saved_operands(ctx)
        gradient, ratio = gradients[0], weight / step
        inside = (ratio >= -ctx.top - 1) & (ratio <= ctx.top)
        # 2^d e, so that nothing is divided by 2^d and multiplied again
        error = torch.floor(highest.to(weight.dtype) / power) * power
        if not ctx.printed:
            error = error + z * power
        error = error - torch.where(inside, ratio, 0.0)
        scale = 1.0 / math.sqrt(max(1, ctx.top) * (weight.numel() // max(1, step.numel())))
        product = gradient * error
        d_step = product.sum() if step.dim() == 0 else product.flatten(1).sum(1).reshape(step.shape)
        return torch.where(inside, gradient, 0.0), d_step * scale, None, None, None, None, None


def _scale_shape(weight_step: str | int, shape: Sequence[int], is_multiplied: bool) -> tuple[int, ...]:
    """() for one step, (channels,) or (channels, groups)."""
    if weight_step == "layer":
        return ()
    length = math.prod(shape[1:])
    if not isinstance(weight_step, int) or length % weight_step:
        return (shape[0],)
    if is_multiplied and (len(shape) > 2 or length == weight_step):
        return (shape[0],)
    return (shape[0], length // int(weight_step))


class VerticalWeightQuantizer(WeightQuantizer):
    """Nested floor codes of one weight.

    Args:
        bits: weight bits of every mode, by row.
        config: options of the scheme.
        shape: of the weight; dimension 0 are the output channels.
        covering: whether the first step is to cover every weight, which is good enough without calibration.
        is_multiplied: whether steps of groups are rounded to multiples of a channel's unit, as linear layers
            that multiply codes with codes need them; other layers have a step for each channel then.

    Attributes:
        step: (steps,) float parameter, step sizes s of the highest mode; (1,) for one, as fully_shard takes
            no scalars.
        centres: (steps,) float buffer, the value that each group's codes lie around, 0 until a search; only
            for steps of groups that are not rounded.
        powers, offsets: (rows,) 2^d and z, for the rows of policies.
    """

    powers: Tensor
    offsets: Tensor
    centres: Tensor | None

    def __init__(
        self,
        bits: Sequence[int],
        config: VerticalConfig,
        shape: Sequence[int] = (),
        covering: bool = False,
        is_multiplied: bool = False,
    ) -> None:
        super().__init__()
        self.covering = covering
        self.bits, self.highest_bits = tuple(bits), max(bits)
        self.compensation = config.compensation
        self.printed = config.step_gradient == "printed"
        self.scale_shape = _scale_shape(config.weight_step, shape, is_multiplied)
        self.step = nn.Parameter(torch.ones(math.prod(self.scale_shape)))
        is_grouped = len(self.scale_shape) > 1
        self.is_multiplied = is_multiplied and is_grouped
        centred = is_grouped and not is_multiplied
        self.register_buffer("centres", torch.zeros(len(self.step)) if centred else None)
        numbers = torch.tensor([self._numbers(row) for row in range(len(bits))])
        self.register_buffer("powers", numbers[:, 0].clone(), persistent=False)
        self.register_buffer("offsets", numbers[:, 1].clone(), persistent=False)

    def _numbers(self, row: int) -> tuple[float, float]:
        """2^d and z of a mode."""
        dropped = self.highest_bits - self.bits[row]
        numerator, shift = self._offset(row)
        return 2.0**dropped, numerator * 2.0**-shift

    def _offset(self, row: int) -> tuple[int, int]:
        return compensation(self.highest_bits - self.bits[row]) if self.compensation else (0, 0)

    def initialise(self, weight: Tensor) -> None:
        """s = 2 mean|W| / sqrt(2^K - 1) (Sec. 6.1, printed there for K = 4), or max|W| / (2^(K-1) - 1)."""
        with torch.no_grad():
            self.step.data = self._first_step(weight)
            if self.centres is not None:
                self.centres = torch.zeros_like(self.step)

    def _rows_of(self, weight: Tensor) -> Tensor:
        """(steps, weights of each)."""
        return weight.reshape(len(self.step), -1)

    def _first_step(self, weight: Tensor) -> Tensor:
        magnitudes = self._rows_of(weight).abs()
        if self.covering:
            step = magnitudes.amax(1) / max(1, 2 ** (self.highest_bits - 1) - 1)
        else:
            step = 2.0 * magnitudes.mean(1) / math.sqrt(2**self.highest_bits - 1)
        return step.clamp_min(SMALLEST_STEP).to(weight.dtype)

    def search(self, weight: Tensor, energy: Tensor) -> None:
        """The step with the least errors of all modes, and each group's centre; a trained step stays.

        What is least is the sum over the modes of log(squared error weighted by `energy`) / bits: the codes
        of all modes follow from one step, and low modes have more to lose.
        """
        if not torch.allclose(self.step.detach(), self._first_step(weight), rtol=1e-4, atol=0.0):
            return
        rows = self._rows_of(weight).float()
        energies = self._rows_of(energy.float().expand(weight.shape))
        pieces = max(1, PIECE // rows.shape[1])
        found = [
            self._least_errors(*both) for both in zip(rows.split(pieces), energies.split(pieces), strict=True)
        ]
        step, centre = (torch.cat(parts) for parts in zip(*found, strict=True))
        self.step.data = step.clamp_min(SMALLEST_STEP).to(weight.dtype)
        if self.centres is not None:
            self.centres = centre.to(weight.dtype)

    def _least_errors(self, rows: Tensor, energies: Tensor) -> tuple[Tensor, Tensor]:
        """For each row, a step and the centre of its codes, which only groups move: they have few weights."""
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        grouped = self.centres is not None
        best = torch.zeros_like(low), torch.zeros_like(low)
        least = torch.full_like(low, torch.inf)

        def offer(step: Tensor, centre: Tensor) -> None:
            nonlocal best, least
            step = step.clamp_min(SMALLEST_STEP)
            errors = self._log_errors(rows - centre if grouped else rows, energies, step)
            better = errors < least
            best = torch.where(better, step, best[0]), torch.where(better, centre, best[1])
            least = torch.minimum(errors, least)

        for part in CENTRES if grouped else (0.0,):
            centre = (low + high) * (part / 2)
            whole = torch.maximum(high - centre, centre - low) / max(1, 2 ** (self.highest_bits - 1) - 1)
            for part_of_whole in PARTS:
                offer(whole * part_of_whole, centre)
        for _ in range(REFINEMENTS):
            step, centre = best
            for move in MOVES if grouped else ():
                offer(step, centre + step * (move * 2.0 ** (self.highest_bits - min(self.bits))))
            step, centre = best
            for stretch in STRETCHES:
                offer(step * stretch, centre)
        return best[0].squeeze(1), best[1].squeeze(1)

    def _log_errors(self, rows: Tensor, energies: Tensor, step: Tensor) -> Tensor:
        """(rows, 1) what `search` makes least."""
        errors = rows.new_zeros(len(self.bits), len(rows), 1)
        for piece, energy in zip(rows.split(PIECE, dim=1), energies.split(PIECE, dim=1), strict=True):
            highest = highest_code(piece, step, self.highest_bits)  # a piece stays in the cache
            for row in range(len(self.bits)):
                power, z = self._numbers(row)
                code = highest if power == 1.0 else torch.floor(highest / power).add_(z)
                error = torch.addcmul(piece, code, step * power, value=-1.0)
                errors[row] += error.square_().mul_(energy).sum(1, keepdim=True)
        weights = torch.tensor(self.bits, dtype=rows.dtype).reciprocal_().reshape(-1, 1, 1)
        return errors.clamp_min_(SMALLEST_STEP**2).log_().mul_(weights.to(rows.device)).sum(0)

    def forward(self, weight: Tensor, row: Row) -> Tensor:
        """s_b (c_b + z_b), the shape of `weight`."""
        power: Bound
        z: Bound
        if isinstance(row, int):
            power, z = self._numbers(row)
        else:
            power, z = picked(self.powers, row), picked(self.offsets, row)
        one = not self.scale_shape
        rows = weight if one else self._rows_of(weight)
        centre = None if self.centres is None else self.centres.unsqueeze(1)
        rows = rows if centre is None else rows - centre
        step = hold_positive(self.step.squeeze(0) if one else self.step.unsqueeze(1))
        if self.is_multiplied:
            unit, multiples = self._multiples()
            rounded = (unit.unsqueeze(1) * multiples).reshape(-1, 1)
            step = step + (rounded.to(step.dtype) - step).detach()
        highest = self.once_per_step(self._highest, rows, step.detach())
        top = 2 ** (self.highest_bits - 1) - 1
        output: Tensor = _VerticalWeight.apply(rows, step, highest, power, z, self.printed, top)
        return (output if centre is None else output + centre).reshape(weight.shape)

    def _multiples(self) -> tuple[Tensor, Tensor]:
        """(channels,) unit and (channels, groups) multiples of it that steps are rounded to, float64."""
        steps = hold_positive(self.step.detach()).double().reshape(self.scale_shape)
        unit = steps.amax(1) / MOST_MULTIPLES
        return unit, (steps / unit.unsqueeze(1)).round_().clamp_(1, MOST_MULTIPLES)

    def _highest(self, weight: Tensor, step: Tensor) -> Tensor:
        return highest_code(weight, step, self.highest_bits).to(torch.int8)

    def codes(self, weight: Tensor, row: int) -> WeightCodes:
        """The mode's integer codes, from W and s in float64."""
        dropped = self.highest_bits - self.bits[row]
        step = hold_positive(self.step.detach()).double()
        scale, multipliers = step.reshape(self.scale_shape), None
        if self.is_multiplied:
            scale, multiples = self._multiples()
            step, multipliers = (scale.unsqueeze(1) * multiples).reshape(-1), multiples.to(torch.int16)
        rows = self._rows_of(weight.detach())
        code = torch.empty(rows.shape, dtype=torch.int16, device=rows.device)
        count = max(1, PIECE // rows.shape[1])  # float64 temporaries would be many times the weight
        for start in range(0, len(rows), count):
            part = slice(start, start + count)
            for piece, found in zip(rows[part].split(PIECE, 1), code[part].split(PIECE, 1), strict=True):
                values = piece.double()
                if self.centres is not None:
                    values = values - self.centres[part].double().unsqueeze(1)
                highest = highest_code(values, step[part].unsqueeze(1), self.highest_bits)
                found.copy_(lower_code(highest, dropped))
        centre = None if self.centres is None else self.centres.double()
        return WeightCodes(
            code.reshape(weight.shape),
            self.bits[row],
            True,
            scale * 2.0**dropped,
            *self._offset(row),
            None if centre is None else centre.reshape(self.scale_shape),
            multipliers,
        )

    def extra_repr(self) -> str:
        """Bits and compensation."""
        return f"bits={self.bits}, compensation={self.compensation}"
