"""Activation quantiser with learned thresholds and equidistant values.

Zechun Liu et al., "Nonuniform-to-Uniform Quantization: Towards Accurate Quantization via Generalized
Straight-Through Estimation", Sec. 3. With intervals a_1 .. a_n, n = 2^b - 1, thresholds are
T_1 = start + a_1 / 2 and T_(i+1) = T_i + (a_i + a_(i+1)) / 2; the code of x counts the thresholds that do not
lie above beta1 x and stands for beta2 * code * 2 / n.
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
from .mode_input import picked
from .quantizers import ActivationQuantizer, ThresholdGrid, scale_gradient, write_row
from .rounding import Again, Bound, Rounding, save_operands, saved_operands, with_note
from .step_search import least_squares


def knots_of(intervals: Tensor, start: Tensor) -> Tensor:
    """(n + 1,) ends of the pieces of the function that gradients are of: d_0 = start, d_i = d_(i-1) + a_i."""
    return start + torch.cat([intervals.new_zeros(1), intervals.cumsum(0)])


def thresholds_of(intervals: Tensor, start: Tensor) -> Tensor:
    """(n,) thresholds, each in the middle of its interval."""
    knots = knots_of(intervals, start)
    return (knots[:-1] + knots[1:]) / 2


#: Intervals of levels that a mode has not: no value reaches them. Finite, so that averages of parameters are.
UNUSED = 2.0**100

#: beta2 is held away from 0, where its gradient could not be told.
SMALLEST_SCALE = 2.0**-100

#: From so many levels on, a binary search is faster than comparisons.
MOST_COMPARISONS = 40


def reached(values: Tensor, levels: Tensor) -> Tensor:
    """How many of `levels` do not lie above each value: (n,) levels, uint8 of the shape of `values`."""
    if len(levels) > MOST_COMPARISONS:
        return torch.bucketize(values.contiguous(), levels, right=True).to(torch.uint8)
    if torch.compiler.is_compiling():  # one loop over the values, which vectorises in one dtype only
        ones = torch.ones_like(values)
        count = torch.zeros_like(values)
        for level in levels:
            count = count + torch.where(values >= level, ones, 0.0)
        return count
    count = torch.zeros_like(values, dtype=torch.uint8)
    for level in levels:
        count += (values >= level).view(torch.uint8)
    return count


def counted(
    x: Tensor, intervals: Tensor, start: Tensor, before: Tensor, after: Tensor, height: Bound
) -> Tensor:
    """after * height * (number of thresholds <= before * x), in the dtype of `x`.

    Args:
        x: tensor of any shape.
        intervals: (n,) a, those beyond a mode's own `UNUSED`.
        start, before, after: start, beta1, beta2, shape ().
        height: distance of the values, 2 / n.
    """
    code = reached(x.to(intervals.dtype) * before, thresholds_of(intervals, start))
    return (code.to(intervals.dtype) * (after * height)).to(x.dtype)


def _pieces(values: Tensor, knots: Tensor, output: Tensor, scale: Tensor | None) -> Tensor:
    """How many knots each value has reached: 0 below the first, n + 1 from the last one on.

    Thresholds and knots alternate, so the code tells it but for one comparison; `scale` is what the output's
    codes were multiplied with, None where that cannot be undone.
    """
    if scale is None or torch.compiler.is_compiling() or not bool(scale):
        return reached(values, knots).to(torch.int32)
    code = (output * (1.0 / scale)).round_().to(torch.int32)
    return code + (values >= knots.index_select(0, code))


# an operator of its own, because compilers know no size for bincount, and make one addition after another of
# index_add
@torch.library.custom_op("qcompile::sums_by", mutates_args=())
def _sums_by(index: Tensor, values: Tensor, count: int) -> Tensor:
    """(count,) sums of the values with each index, added in float64."""
    sums = torch.bincount(index.reshape(-1), weights=values.reshape(-1), minlength=count)
    return sums.to(values.dtype)


@_sums_by.register_fake
def _(index: Tensor, values: Tensor, count: int) -> Tensor:
    return values.new_empty(count)


class _CountThresholds(torch.autograd.Function):
    """`counted`, with the generalised straight-through estimator (Eq. 13) as its gradient.

    Inside piece j, d_(j-1) <= v < d_j with v = beta1 x, the output is taken to be
    beta2 h (j - 1 + (v - d_(j-1)) / a_j); it is constant outside. beta2 multiplies the codes themselves, so
    its gradient is exact.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        intervals: Tensor,
        start: Tensor,
        before: Tensor,
        after: Tensor,
        height: Bound,
        again: Again,
    ) -> Tensor:
        ctx.again = again
        save_operands(ctx, x, intervals, start, before, after, height)
        return counted(x, intervals, start, before, after, height)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        operands = saved_operands(ctx)
        x, intervals, start, before, after, height = operands
        if torch.compiler.is_compiling():
            output = counted(*operands)
        else:
            output = ctx.again.take(counted, *operands)
        wide = intervals.dtype
        # elements in one order, whatever the memory layout
        given, x_flat, output = [_flat(one, x).to(wide) for one in (gradients[0], x, output)]
        value, knots = x_flat * before, knots_of(intervals, start)
        piece = _pieces(value, knots, output, after * height if x.dtype == wide else None)
        outside = intervals.new_zeros(1)
        slopes = torch.cat([outside, after * height / intervals, outside])
        d_value = given * slopes.index_select(0, piece)
        sums = _sums_by(piece, given, len(slopes))[1:-1]
        used = intervals < UNUSED
        ways = torch.where(used, _sums_by(piece, given * value, len(slopes))[1:-1] - knots[:-1] * sums, 0.0)
        sums = torch.where(used, sums * slopes[1:-1], 0.0)
        later = sums.sum() - sums.cumsum(0)
        d_intervals = torch.where(used, -ways * slopes[1:-1] / intervals - later, 0.0)
        d_after = torch.dot(given, output) / after
        d_before = torch.dot(d_value, x_flat)
        d_x = _like((d_value * before).to(x.dtype), x)
        return d_x, d_intervals, -sums.sum(), d_before, d_after, None, None


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _flat(tensor: Tensor, like: Tensor) -> Tensor:
    """Elements in the order in which `like` holds them, one dimension; a view where the layouts agree."""
    return (tensor.permute(0, 2, 3, 1) if _is_channels_last(like) else tensor).reshape(-1)


def _like(flat: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_flat`."""
    if _is_channels_last(like):
        n, c, h, w = like.shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
    return flat.view(like.shape)


class ThresholdActivationQuantizer(ActivationQuantizer):
    """Learned thresholds, start and scales, all of them per mode.

    Args:
        bits: activation bits of every mode, by row.
        from_data: the first batch sets beta1 and beta2 = 1 / beta1 so that its values fit the thresholds;
            without, both start at 1 as in the paper.
        learned: whether thresholds are trained; if not, they stay at equal distances.
        first: where the first interval begins before training.
        smallest: intervals are held at least this large (Sec. 4.1).

    Attributes:
        interval: (rows, 2^B - 1) a; those beyond a mode's own 2^b - 1 are `UNUSED` and not trained.
        start, before, after: (rows,) start, beta1, beta2.
        heights: (rows,) distance of the values, for the rows of policies.
    """

    heights: Tensor

    def __init__(
        self,
        bits: Sequence[int],
        from_data: bool = False,
        learned: bool = True,
        first: float = 0.0,
        smallest: float = 1e-3,
    ) -> None:
        super().__init__(len(bits))
        self.bits, self.from_data, self.first, self.smallest = tuple(bits), from_data, first, smallest
        self.interval = nn.Parameter(self._equal_intervals(), requires_grad=learned)
        self.start = nn.Parameter(torch.full((len(bits),), float(first)), requires_grad=learned)
        self.before = nn.Parameter(torch.ones(len(bits)))
        self.after = nn.Parameter(torch.ones(len(bits)))
        heights = torch.tensor([2.0 / (2**b - 1) for b in bits])
        self.register_buffer("heights", heights, persistent=False)
        self.initialised.fill_(not from_data)

    def _equal_intervals(self) -> Tensor:
        most = 2 ** max(self.bits) - 1
        levels = [2**bits - 1 for bits in self.bits]
        return torch.tensor([[2.0 / n] * n + [UNUSED] * (most - n) for n in levels])

    def initialise(self, x: Tensor, row: int, agreement: Agreement) -> None:
        """beta1 with the least squared error at equal thresholds, beta2 = 1 / beta1.

        Raises:
            InvalidArgument: if the batch holds NaN or infinity.
        """
        largest = float(agreement.largest(x.detach().amax().float() if x.numel() else x.new_zeros(())))
        if not math.isfinite(largest):
            raise InvalidArgument("cannot set activation scales from a batch that holds NaN or infinity")
        if self.from_data and largest > 0.0:
            levels = 2 ** self.bits[row] - 1
            intervals = torch.full((levels,), 2.0 / levels, device=x.device)
            start = intervals.new_tensor(self.first)

            def values(part: Tensor, size: Tensor) -> Tensor:
                return counted(part, intervals, start, 2.0 / size, size / 2.0, 2.0 / levels)

            size = least_squares(x, largest, values, agreement)
            write_row(self.before, row, 2.0 / size)
            write_row(self.after, row, size / 2.0)
        self.initialised[row] = True

    def forget(self) -> None:
        """Equal intervals and scales of 1, which the next batch sets anew if they come from data."""
        self.initialised.fill_(not self.from_data)
        with torch.no_grad():
            self.interval.copy_(self._equal_intervals())
            self.start.fill_(self.first)
            self.before.fill_(1.0)
            self.after.fill_(1.0)

    def forward(self, x: Tensor, active: ActiveMode) -> Tensor:
        """Round `x` (any shape) to the values of the active mode; same shape and dtype."""
        row, own = active.row_of(self.slot), active.own_gradient_scale
        intervals, start, before, after = [
            scale_gradient(picked(one, row).float() if one.dtype in _HALVES else picked(one, row), own)
            for one in (self.interval, self.start, self.before, self.after)
        ]
        height: Bound
        if isinstance(row, int):
            levels = 2 ** self.bits[row] - 1
            intervals, height = intervals[:levels], 2.0 / levels
        else:
            height = picked(self.heights, row).to(intervals.dtype)
        after = after + torch.where(after == 0.0, SMALLEST_SCALE, 0.0).to(after.dtype)
        intervals, again = intervals.clamp_min(self.smallest), Again()
        output = _CountThresholds.apply(x, intervals, start, before, after, height, again)
        return with_note(output, Rounding(counted, (x, intervals, start, before, after, height), again))

    def grid(self, row: int) -> ThresholdGrid:
        """The mode's thresholds as they stand, in float64."""
        levels = 2 ** self.bits[row] - 1
        intervals = self.interval[row, :levels].detach().double().clamp_min(self.smallest)
        found = thresholds_of(intervals, self.start[row].detach().double())
        scale = float(self.after[row].detach().double()) * 2.0 / levels
        return ThresholdGrid(scale, 0, levels, tuple(found.tolist()), float(self.before[row].detach()))

    def extra_repr(self) -> str:
        """Bits."""
        return f"bits={self.bits}"


_HALVES = (torch.float16, torch.bfloat16)
