"""What a scheme's quantisers look like to the rest of the library.

Every quantised tensor is `scale * (code + offset)` with an integer code and a dyadic offset
`numerator / 2**shift`, so one packed operator serves all schemes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.modes import ActiveMode

from .agreement import Agreement
from .mode_input import ModeModule, Row


@dataclass(frozen=True)
class WeightCodes:
    """A weight as integers.

    Attributes:
        codes: int16 tensor of the weight's shape.
        bits: bits of each code.
        signed: two's complement codes if true, else unsigned.
        scale: float64 tensor, a scalar, one value per output channel, or in modes for weights only
            (channels, groups), the groups being equal parts of a channel's weights in order.
        offset_numerator, offset_shift: the offset `numerator / 2**shift` that is added to every code.
        multipliers: (channels, groups) int16 from 1 on: what a channel's scale is multiplied with for each
            group, the groups being equal parts of a channel's weights in order; None for 1.
        centre: float64, the shape of `scale`: the value that all codes lie around; None for 0. In modes for
            weights only.
    """

    codes: Tensor
    bits: int
    signed: bool
    scale: Tensor
    offset_numerator: int = 0
    offset_shift: int = 0
    centre: Tensor | None = None
    multipliers: Tensor | None = None


@dataclass(frozen=True)
class ActivationGrid:
    """What an activation is rounded to: code k of low .. high stands for `scale * k`.

    Attributes:
        scale: real value of one code.
        low, high: range of codes.
        spacing: distance of the inputs at which neighbouring codes begin; None where each input gets the code
            of the nearest value, half to even.
        start: the input at which code 0 begins; only with `spacing`.
    """

    scale: float
    low: int
    high: int
    spacing: float | None = None
    start: float = 0.0

    @property
    def distance(self) -> float:
        """Of the inputs at which neighbouring codes begin."""
        return self.scale if self.spacing is None else self.spacing

    @property
    def ends(self) -> tuple[float, float]:
        """Inputs between which codes change."""
        return self.start + self.low * self.distance, self.start + (self.high + 1) * self.distance


@dataclass(frozen=True)
class ThresholdGrid:
    """Codes that begin at thresholds of any distance: code k of low .. high stands for `scale * k`.

    Attributes:
        scale: real value of one code.
        low, high: range of codes.
        thresholds: increasing, high - low of them; code low + j begins where `before * x` reaches the j-th.
        before: factor on inputs; codes fall as inputs rise where it is negative.
    """

    scale: float
    low: int
    high: int
    thresholds: tuple[float, ...]
    before: float = 1.0

    @property
    def ends(self) -> tuple[float, float]:
        """Inputs between which codes change, and some room."""
        width = 2.0 * len(self.thresholds) * self.distance
        return -width, width

    @property
    def distance(self) -> float:
        """Mean distance of the inputs at which neighbouring codes begin."""
        width = max(abs(self.thresholds[0]), abs(self.thresholds[-1])) or 1.0
        return width / len(self.thresholds) / (abs(self.before) or 1.0)


@dataclass(frozen=True)
class FloatRange:
    """An activation that stays in float, clipped to low .. high: what a mode in float has for a grid."""

    low: float = -math.inf
    high: float = math.inf


class WeightQuantizer(nn.Module):
    """Base of weight quantisers; one instance per layer."""

    group = "quantizers"
    is_added = True
    _kept: tuple[Any, Tensor] | None = None
    _keeps = False

    @property
    def own_bits(self) -> tuple[int, ...]:
        """Weight bits of every mode, by row, where the layer has candidates of its own; else empty."""
        return ()

    def keep(self, keeps: bool) -> None:
        """Between `keep(True)` and `keep(False)`, modes share what `once_per_step` computes."""
        self._keeps, self._kept = keeps, None

    def once_per_step(self, compute: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """`compute(*tensors)` without gradient: what all modes derive their codes from.

        It is kept over the modes of one joint step in eager code; a compiler finds common expressions itself.
        """
        with torch.no_grad():
            if not self._keeps or torch.compiler.is_compiling():
                return compute(*tensors)
            key = [(one.data_ptr(), one._version, one.dtype) for one in tensors[:1]], self._versions()
            if self._kept is None or self._kept[0] != key:
                self._kept = key, compute(*tensors)
            return self._kept[1]

    def _versions(self) -> list[int]:
        return [one._version for one in self.parameters()]

    def forward(self, weight: Tensor, row: Row) -> Tensor:
        """Dequantised weight for training, with the scheme's straight-through gradient."""
        raise TypeError(f"{type(self).__name__} does not define forward()")

    def codes(self, weight: Tensor, row: int) -> WeightCodes | Tensor:
        """The weight's integers in the mode of one row, from float64; a float tensor in a float mode."""
        raise TypeError(f"{type(self).__name__} does not define codes()")

    def initialise(self, weight: Tensor) -> None:
        """Set parameters from a float weight (after construction and after loading float weights)."""
        raise TypeError(f"{type(self).__name__} does not define initialise()")

    def search(self, weight: Tensor, energy: Tensor) -> None:
        """Set parameters that training has not moved with care, for use without training.

        Args:
            weight: the float weight.
            energy: broadcasts against `weight`: how much an error of each weight counts, such as the mean
                square of what it is multiplied with.
        """


class ActivationQuantizer(ModeModule):
    """Base of activation quantisers; parameters are stacked over the modes along dimension 0.

    Attributes:
        initialised: bool buffer, one entry per mode; parameters of a mode are set from its first batch,
            before the mode's first forward (`qcompile/first_batch.py`), never within one.
        from_data: whether a first batch sets anything.
    """

    group = "quantizers"
    is_added = True
    from_data: bool = True
    initialised: Tensor

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.register_buffer("initialised", torch.zeros(rows, dtype=torch.bool))

    def forward(self, x: Tensor, active: ActiveMode) -> Tensor:
        """Dequantised activation for training."""
        raise TypeError(f"{type(self).__name__} does not define forward()")

    def initialise(self, x: Tensor, row: int, agreement: Agreement) -> None:
        """Set the parameters of one mode from a batch.

        Args:
            x: the tensor that will be quantised.
            row: the mode.
            agreement: with the other ranks, on statistics of the batch.
        """
        raise TypeError(f"{type(self).__name__} does not define initialise()")

    def search(self, x: Tensor, row: int) -> None:
        """Set the parameters of one mode from a calibration batch, with care; by default as `initialise`."""
        self.initialise(x, row, Agreement())

    def forget(self) -> None:
        """Let the next batch set all parameters anew."""
        self.initialised.zero_()

    def own_parameters(self) -> list[nn.Parameter]:
        """All of them."""
        return list(self.parameters(recurse=False))

    def grid(self, row: int) -> ActivationGrid | ThresholdGrid | FloatRange:
        """The integer grid of one mode; the range it is clipped to in a float mode."""
        raise TypeError(f"{type(self).__name__} does not define grid()")


def write_row(parameter: Tensor, row: int, value: float) -> None:
    """Set one mode's entry, which no graph holds yet; graphs of other modes may hold theirs."""
    parameter.data[row] = value  # a write that autograd counts would spoil those


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
