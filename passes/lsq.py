"""Learned step size quantisation of activations, one step per mode.

S. K. Esser et al., "Learned Step Size Quantization": the step is a parameter; its gradient is scaled by
1 / sqrt(values per sample * highest code).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qcompile.errors import InvalidArgument
from qcompile.modes import FLOAT_BITS, ActiveMode

from .agreement import Agreement
from .cpu_gradients import dot, has_kernels, within
from .mode_input import Row, picked
from .quantizers import ActivationGrid, ActivationQuantizer, FloatRange, write_row
from .rounding import Again, Bound, Rounding, rounded, save_operands, saved_operands, with_note
from .step_search import least_squares

#: A step below this would divide by zero; training that pushes a step there is held at it.
SMALLEST_STEP = 1e-8

#: Codes begin elsewhere than usual where this makes steps, or errors, smaller by this factor.
CLEARLY_FINER = 0.8

#: Equal parts of a range of codes at which it may begin.
LOW_CANDIDATES = 16

#: Values that choose among those.
FEW_SAMPLES = 1 << 13


class _LsqActivation(torch.autograd.Function):
    """step * clip(round(x / step), low, high); dx = g inside the range, ds = scale * sum(g * (code - x / s))
    inside and scale * sum(g * code) outside. Saves x, which whatever made it has mostly saved already.

    With `per_sample`, the scale is divided by the root of the number of values of a sample.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        low: Bound,
        high: Bound,
        gradient_scale: Bound,
        per_sample: bool,
        again: Again,
    ) -> Tensor:
        ctx.again, ctx.per_sample = again, per_sample
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
        scale = gradient_scale * math.prod(x.shape[1:]) ** -0.5 if ctx.per_sample else gradient_scale
        return d_x, (d_step * scale).to(step.dtype), None, None, None, None, None


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
    """The step with the least squared rounding error, among fractions of the one that covers all values.

    Args:
        x: float tensor of any shape, finite.
        low, high: range of codes.
    """
    covering = covering_step(ends(x, Agreement()), low, high)
    if covering <= SMALLEST_STEP:
        return SMALLEST_STEP
    found = least_squares(x, covering, lambda part, step: rounded(part, step, low, high), Agreement())
    return max(found, SMALLEST_STEP)


def ends(x: Tensor, agreement: Agreement) -> tuple[float, float]:
    """The smallest and the largest value on all ranks, zero among them; not finite if one is not."""
    low, high = x.detach().aminmax() if x.numel() else (x.new_zeros(()), x.new_zeros(()))
    below, above = agreement.largest(torch.stack([-low, high]).float()).tolist()
    return -max(below, 0.0), max(above, 0.0)  # NaN stays NaN as the first argument


def covering_step(values: tuple[float, float], low: int, high: int) -> float:
    """The least step with which codes reach both ends, or half a code where there is none on a side."""
    smallest, largest = values
    return max(-smallest / (-low or 0.5), largest / (high or 0.5))


def _mean_magnitude(x: Tensor, agreement: Agreement) -> float:
    """mean|x| over all ranks."""
    total = x.detach().abs().sum(dtype=torch.float64)
    sums = agreement.total(torch.stack([total, torch.full_like(total, x.numel())])).tolist()
    return float(sums[0]) / max(1.0, float(sums[1]))


class LsqActivationQuantizer(ActivationQuantizer):
    """Uniform activation quantiser with one learned step per mode.

    Where the tensor can be negative, a mode has codes -2^(b-1) .. 2^(b-1) - 1, unless the values that set its
    step ask for 2^b others around zero: behind GELU or SiLU few are negative. Codes of 8 bits stay as they
    are, since those of another range fit no 8-bit type.

    Args:
        bits: activation bits of every mode, by row; 32 for a mode that leaves activations in float.
        signed: whether the tensor can be negative; unsigned codes where it cannot.
        shared: whether modes with equal bits have one step together.
        first: what a first batch sets a step to: `largest` max|x| / highest code (vertical layering,
            Sec. 6.1), `mean` 2 mean|x| / sqrt(highest code), as LSQ does.
        scaled_gradient: multiply the steps' gradients as LSQ does.
        learned: whether training moves the steps; if not, they stay where data put them.

    Attributes:
        widths: bits of every step.
        step: (steps,) float parameter, or buffer if not learned: one of every mode, or of every width if
            modes share them.
        lows: (steps,) float buffer, the lowest codes.
        places: (rows,) float buffer, the place of every mode's step, for the rows of policies; averages of
            models round whole numbers down.
        spans: (steps,) float buffer, the highest codes less the lowest, for the rows of policies.
    """

    step: Tensor
    lows: Tensor
    places: Tensor
    spans: Tensor

    def __init__(
        self,
        bits: Sequence[int],
        signed: bool,
        shared: bool = False,
        first: Literal["largest", "mean"] = "largest",
        scaled_gradient: bool = True,
        learned: bool = True,
    ) -> None:
        super().__init__(len(bits))
        self.bits, self.signed, self.learned = tuple(bits), signed, learned
        self.shared, self.first, self.scaled_gradient = shared, first, scaled_gradient
        self.widths = tuple(sorted(set(bits))) if shared else self.bits
        self._places = [self.widths.index(one) for one in bits] if shared else list(range(len(bits)))
        if learned:
            self.step = nn.Parameter(torch.ones(len(self.widths)))
        else:
            self.register_buffer("step", torch.ones(len(self.widths)))
        self._lows = self._usual_lows()  # a copy in numbers, which graphs take without asking the tensor
        self.register_buffer("lows", torch.tensor(self._lows, dtype=torch.float32))
        self.register_buffer("places", torch.tensor(self._places, dtype=torch.float32), persistent=False)
        spans = torch.tensor([2.0**one - 1 for one in self.widths])
        self.register_buffer("spans", spans, persistent=False)
        self._mark_float_rows()

    def _usual_lows(self) -> list[int]:
        return [-(2 ** (bits - 1)) if self.signed else 0 for bits in self.widths]

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._lows = [int(low) for low in self.lows.tolist()]

    def _mark_float_rows(self) -> None:
        for row, bits in enumerate(self.bits):
            if bits == FLOAT_BITS:
                self.initialised[row] = True

    def code_range(self, row: int) -> tuple[int, int]:
        """(lowest, highest) code of a mode."""
        low = self._lows[self._places[row]]
        return low, low + 2 ** self.bits[row] - 1

    def initialise(self, x: Tensor, row: int, agreement: Agreement) -> None:
        """The first step, from one batch; where modes share steps, all that are not set yet.

        Codes begin lower or higher than usual if the step that covers the batch gets clearly finer.

        Raises:
            InvalidArgument: if the batch holds NaN or infinity.
        """
        found = ends(x, agreement)
        if not all(map(math.isfinite, found)):
            raise InvalidArgument("cannot set an activation step from a batch that holds NaN or infinity")
        mean = _mean_magnitude(x, agreement) if self.first == "mean" else 0.0
        self._set_first(row, found, mean)
        for other, done in enumerate(self.initialised.tolist()):
            if self.shared and not done and not bool(self.initialised[other]):
                self._set_first(other, found, mean)

    def _set_first(self, row: int, found: tuple[float, float], mean: float) -> None:
        """From the smallest and the largest value, and the mean magnitude where `first` asks for it."""
        self._choose_low(row, lambda low, high: covering_step(found, low, high))
        low, high = self.code_range(row)
        if self.first == "mean":
            step = 2.0 * mean / math.sqrt(max(1, high))
        elif low == self._usual_lows()[self._places[row]]:
            step = max(-found[0], found[1]) / max(1, high)
        else:
            step = covering_step(found, low, high)
        self.set_step(row, max(step, SMALLEST_STEP))

    def search(self, x: Tensor, row: int) -> None:
        """The lowest code and the step with the least squared rounding error."""
        flat = x.detach().float().reshape(-1)
        few = flat[:: max(1, flat.numel() // FEW_SAMPLES)]

        def error(low: int, high: int) -> float:
            step = few.new_tensor(least_squares_step(few, low, high))
            return float((rounded(few, step, low, high) - few).square_().mean().sqrt())

        self._choose_low(row, error)
        self.set_step(row, least_squares_step(x, *self.code_range(row)))

    def _choose_low(self, row: int, cost: Callable[[int, int], float]) -> None:
        """Let codes begin where `cost(low, high)` is least, as usual if that is not clearly less."""
        place = self._places[row]
        usual, bits = self._usual_lows()[place], self.bits[row]
        span, best = 2**bits - 1, usual
        if self.signed and bits < 8:
            lows = {-round(span * part / LOW_CANDIDATES) for part in range(LOW_CANDIDATES + 1)} - {usual}
            costs = {low: cost(low, low + span) for low in sorted(lows, key=lambda low: abs(low - usual))}
            least = min(costs, key=costs.__getitem__)
            if costs[least] < CLEARLY_FINER * cost(usual, usual + span):
                best = least
        self._lows[place] = best
        write_row(self.lows, place, best)

    def forget(self) -> None:
        """Let the next batch set all steps anew."""
        super().forget()
        with torch.no_grad():
            self.step.fill_(1.0)
            self._lows = self._usual_lows()
            self.lows.copy_(torch.tensor(self._lows))
        self._mark_float_rows()

    def set_step(self, row: int, value: float) -> None:
        """Write one mode's step and mark it as initialised, with all modes that share it."""
        write_row(self.step, self._places[row], value)
        self.initialised[self.places == self._places[row]] = True

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
            place: Row = self._places[row]
        else:
            place = self.places.index_select(0, row).to(torch.int64)
            low = picked(self.lows, place)
            high = low + picked(self.spans, place)
            root = torch.rsqrt(high.clamp_min(1.0))
        scale = active.own_gradient_scale * (root if self.scaled_gradient else 1.0)
        step = hold_positive(picked(self.step, place))
        again = Again()
        output = _LsqActivation.apply(x, step, low, high, scale, self.scaled_gradient, again)
        return with_note(output, Rounding(rounded, (x, step, low, high), again))

    def overwrite(self, *args: Any) -> Any:
        """As a call in evaluation mode, in place for single precision."""
        x, active = args
        row = active.row_of(self.slot)
        if not isinstance(row, int) or x.dtype != torch.float32:
            return self(x, active)
        grid = self.grid(row)
        if isinstance(grid, FloatRange):
            return x
        return x.div_(grid.scale).clamp_(grid.low, grid.high).round_().mul_(grid.scale)

    def grid(self, row: int) -> ActivationGrid | FloatRange:
        """The mode's grid; the scale is the float32 step, exactly."""
        if self.bits[row] == FLOAT_BITS:
            return FloatRange()
        low, high = self.code_range(row)
        step = self.step[self._places[row]].detach().clamp_min(SMALLEST_STEP)
        return ActivationGrid(float(step), low, high)

    def extra_repr(self) -> str:
        """Bits and sign."""
        return f"bits={self.bits}, {'signed' if self.signed else 'unsigned'}"
