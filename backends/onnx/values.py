"""What a tensor of the integer graph is in the ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from .fused import ROUNDING, FusedLayer

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Codes:
    """Low-bit integers as uint8: stored value = integer + zero_point.

    Attributes:
        name: tensor in the ONNX graph.
        shape: of the tensor in the integer graph, channels in dimension 1.
        unit: real value of one code, which the runtime sees as the scale of DequantizeLinear.
        zero_point: 0 for unsigned codes.
        low, high: bounds of the integers.
        last: whether the ONNX tensor has its channels in the last dimension.
    """

    name: str
    shape: tuple[int, ...]
    unit: float
    zero_point: int
    low: int
    high: int
    last: bool = False


@dataclass(frozen=True)
class Real:
    """Integers of more than 8 bits as float32: stored value = integer * factor, up to rounding.

    Attributes:
        name: tensor in the ONNX graph.
        shape: of the tensor in the integer graph, channels in dimension 1.
        factor: shape () or broadcastable against `shape`.
        low, high: bounds of the integers, shape () or broadcastable.
        last: whether the ONNX tensor has its channels in the last dimension.
        is_sum: whether a convolution of integers writes the tensor.
        taps: products in one sum of that convolution.
        reach: bound of the magnitude of its partial sums, in integers, shape () or broadcastable.
    """

    name: str
    shape: tuple[int, ...]
    factor: Array
    low: Array
    high: Array
    last: bool = False
    is_sum: bool = False
    taps: int = 0
    reach: Array = field(default_factory=lambda: np.zeros(()))

    @property
    def rounding(self) -> Array:
        """Bound of what the convolution rounds, in integers: nothing below 2^24."""
        return np.where(self.reach < 2**24, 0.0, self.taps * self.reach * ROUNDING)

    def merged_rounding(self, offset: Array) -> Array:
        """The same where the runtime makes a scale and an offset that follow part of the convolution.

        Scaled weights are rounded, and sums start from the offset.

        Args:
            offset: in integers of the sum.
        """
        return ROUNDING * ((self.taps + 1) * self.reach + self.taps * np.abs(offset))


@dataclass(frozen=True)
class Accumulators:
    """Sums of a quantised layer as an int32 matrix.

    Attributes:
        name: tensor (rows, channels) in the ONNX graph.
        shape: shape of the layer's output.
        is_conv: whether channels are dimension 1 of it, not the last one.
        low, high: bounds, broadcastable against the layer's output.
    """

    name: str
    shape: tuple[int, ...]
    is_conv: bool
    low: Array
    high: Array

    @property
    def factor(self) -> Array:
        """As that of `Real`: the integers themselves."""
        return np.ones(())

    @property
    def rounding(self) -> Array:
        """As that of `Real`: exact."""
        return np.zeros(())

    def merged_rounding(self, offset: Array) -> Array:
        """As that of `Real`: runtimes merge nothing with integer sums."""
        return np.zeros(())


@dataclass(frozen=True)
class Plain:
    """A tensor that means itself: float islands, user inputs."""

    name: str


@dataclass(frozen=True)
class Constant:
    """A buffer of the integer graph; becomes an initializer where an operator reads it.

    Attributes:
        name: `layer/what`.
        array: the content.
    """

    name: str
    array: NDArray[Any]


@dataclass(frozen=True)
class Deferred:
    """Accumulators that exist only inside of fused layers.

    Attributes:
        codes: the layer's input.
        layers: what to emit, by the `requantize` node that reads the accumulators.
    """

    codes: Codes
    layers: Mapping[fx.Node, FusedLayer]


#: Codes | Real | Accumulators | Plain | Constant | Deferred | tuples of these | sizes and other static values
Value = Any


def scalar(value: float) -> Array:
    """A float64 array of shape ()."""
    return np.asarray(value, np.float64)


def channels(values: NDArray[Any], rank: int, axis: int) -> Array:
    """One value per channel, shaped to broadcast against a tensor of `rank` dimensions along `axis`."""
    return np.asarray(values, np.float64).reshape(-1, *([1] * (rank - 1 - axis)))


def stored_order(rank: int) -> tuple[int, ...]:
    """Dimensions of a tensor of channels in dimension 1, in the order that puts these last."""
    return (0, *range(2, rank), 1)


def as_stored(values: Array, rank: int, last: bool) -> Array:
    """Something that broadcasts against a tensor, reshaped to broadcast against it as it is stored."""
    if not last or values.ndim == 0:
        return values
    return values.reshape((1,) * (rank - values.ndim) + values.shape).transpose(stored_order(rank))
