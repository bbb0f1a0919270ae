"""What a tensor of the integer graph is in the ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from .fused import FusedLayer

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Codes:
    """Low-bit integers as uint8: stored value = integer + zero_point.

    Attributes:
        name: tensor in the ONNX graph.
        unit: real value of one code, which the runtime sees as the scale of DequantizeLinear.
        zero_point: 0 for unsigned codes.
        low, high: bounds of the integers.
    """

    name: str
    unit: float
    zero_point: int
    low: int
    high: int


@dataclass(frozen=True)
class Real:
    """Integers of more than 8 bits as float32: stored value = integer * factor, up to rounding.

    Attributes:
        name: tensor in the ONNX graph.
        factor: shape () or broadcastable against the tensor (one value per channel).
        low, high: bounds of the integers, shape () or broadcastable.
        is_sum: whether a convolution or matrix product of integers writes the tensor.
        rounding: bound of the error of the integers, shape () or broadcastable.
    """

    name: str
    factor: Array
    low: Array
    high: Array
    is_sum: bool = False
    rounding: Array = field(default_factory=lambda: np.zeros(()))


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


Value = Any  # Codes | Real | Plain | Constant | Deferred | a tuple of these | a size or another static value


def scalar(value: float) -> Array:
    """A float64 array of shape ()."""
    return np.asarray(value, np.float64)


def channels(values: NDArray[Any], rank: int, axis: int) -> Array:
    """One value per channel, shaped to broadcast against a tensor of `rank` dimensions along `axis`."""
    return np.asarray(values, np.float64).reshape(-1, *([1] * (rank - 1 - axis)))


def channel_axis(factor: NDArray[Any]) -> int | None:
    """The axis along which a factor varies, counted from the end; None for a scalar.

    Raises:
        ValueError: if it varies along several axes.
    """
    varying = [axis - factor.ndim for axis, size in enumerate(factor.shape) if size > 1]
    if len(varying) > 1:
        raise ValueError(f"a factor of shape {factor.shape} varies along several axes")
    return varying[0] if varying else None
