"""Fold everything between an accumulator and the next quantiser into integers.

Batch normalisation, bias, scales, residual sums and average pooling are affine maps of integers with real
coefficients. `Affine` collects them; `integer_epilogue` turns the result into the normative form

    clip((sum_i m_i * a_i + c) >> e, low, high)

that eval mode, every backend and the file share. Training keeps the float chain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qcompile.errors import FoldError

from .quantizers import ActivationGrid

#: Per-channel values, or one for the whole tensor.
Array: TypeAlias = "NDArray[np.float64] | np.float64"

#: Sums of an epilogue stay below 2^52, so float64 and int64 evaluate them alike.
EPILOGUE_BITS = 52

#: Significant bits of a multiplier: each term's are int32 values times one power of two.
MULTIPLIER_BITS = 31

#: Magnitude of tensors that stay between layers at high precision, such as residual streams. With sums below
#: 2^52 this leaves 22 bits for their multipliers; more of one would take from the other.
WIDE_BITS = 29

#: Sums that give such a tensor stay below this many bits of its unit, so that a sum has 8 bits to round away.
WIDE_SUM_BITS = 43


@dataclass(frozen=True)
class Term:
    """`coefficient * node`, one summand of an affine map.

    Attributes:
        node: integer tensor in the graph under construction.
        coefficient: real factor, shape () or (channels,).
        low, high: bounds of the integers, shape () or (channels,).
    """

    node: Any
    coefficient: Array
    low: Array
    high: Array

    @property
    def bounds(self) -> tuple[float, float]:
        """Bounds over all channels."""
        return float(np.min(self.low)), float(np.max(self.high))

    def real_range(self) -> tuple[Array, Array]:
        """Bounds of `coefficient * node`."""
        a, b = self.coefficient * self.low, self.coefficient * self.high
        return np.minimum(a, b), np.maximum(a, b)


@dataclass(frozen=True)
class Affine:
    """A real tensor as clip(sum of terms + constant, low, high).

    Attributes:
        terms: the summands; their nodes have one shape.
        constant: real summand, shape () or (channels,).
        rank: dimensions of the tensor.
        axis: dimension that per-channel values refer to.
        low, high: clipping that is still to be applied.
        layers: module paths of the layers whose accumulators enter.
        wide_bits: magnitude of the integers if the tensor stays between layers.
    """

    terms: tuple[Term, ...]
    constant: Array
    rank: int
    axis: int
    low: float = -math.inf
    high: float = math.inf
    layers: tuple[str, ...] = ()
    wide_bits: int = WIDE_BITS

    @property
    def is_clipped(self) -> bool:
        """Whether a clip is still to be applied."""
        return self.low != -math.inf or self.high != math.inf

    @property
    def is_plain(self) -> bool:
        """Whether the tensor is one integer tensor times one scalar."""
        one = len(self.terms) == 1 and self.terms[0].coefficient.ndim == 0
        return one and self.constant.ndim == 0 and float(self.constant) == 0.0 and not self.is_clipped

    def real_range(self) -> tuple[Array, Array]:
        """Bounds of the tensor's values, shape () or (channels,)."""
        low, high = self.constant, self.constant
        for term in self.terms:
            a, b = term.real_range()
            low, high = low + a, high + b
        return np.clip(low, self.low, self.high), np.clip(high, self.low, self.high)

    def clipped(self, low: float, high: float) -> Affine:
        """The tensor clipped to [low, high]; clips that cannot act are left out."""
        smallest, largest = self.real_range()
        low = low if float(smallest.min()) < low else -math.inf
        high = high if float(largest.max()) > high else math.inf
        return replace(self, low=max(self.low, low), high=min(max(self.high, low), high))

    def scaled(self, factor: Array, shift: Array) -> Affine:
        """factor * self + shift, per channel or scalar; a pending clip must have been applied."""
        assert not self.is_clipped
        terms = tuple(replace(term, coefficient=term.coefficient * factor) for term in self.terms)
        return replace(self, terms=terms, constant=self.constant * factor + shift)

    def plus(self, other: Affine, factor: float = 1.0) -> Affine:
        """self + factor * other; both without pending clips and of one shape."""
        second = other.scaled(np.float64(factor), np.float64(0.0))
        axis = self.axis if any(t.coefficient.ndim for t in self.terms) or self.constant.ndim else other.axis
        return replace(
            self,
            terms=self.terms + second.terms,
            constant=self.constant + second.constant,
            axis=axis,
            layers=tuple(dict.fromkeys(self.layers + other.layers)),
        )


@dataclass(frozen=True)
class Epilogue:
    """The integers of one normative epilogue: clip((sum m_i * a_i + c) >> shift, low, high).

    Attributes:
        multipliers: one int64 array per term, shape () or (channels,): int32 values times one power of two.
        constant: int64 array, shape () or (channels,); rounding included.
        shift: bits that are dropped.
        low, high: clipping range.
        unit: real value of one output unit.
    """

    multipliers: tuple[NDArray[np.int64], ...]
    constant: NDArray[np.int64]
    shift: int
    low: int
    high: int
    unit: float


def round_to_unit(value: float, unit: float) -> int:
    """The integer that an epilogue gives for a real value: nearest, halves up."""
    return math.floor(value / unit + 0.5)


def staircase_epilogue(affine: Affine, grid: ActivationGrid) -> Epilogue:
    """The epilogue of a quantiser whose codes begin at equal distances: code k at start + k * spacing."""
    assert grid.spacing is not None
    middle = grid.start + grid.spacing / 2
    shifted = replace(
        affine, constant=affine.constant - middle, low=affine.low - middle, high=affine.high - middle
    )
    return replace(integer_epilogue(shifted, grid.spacing, grid.low, grid.high), unit=grid.scale)


def integer_epilogue(affine: Affine, unit: float, low: int, high: int) -> Epilogue:
    """Choose the multipliers of an epilogue that outputs multiples of `unit` within [low, high].

    The shift is the largest for which every sum stays below 2^52 and no multiplier needs more than 31 bits
    to be exact to the last one; terms with larger coefficients keep their first 31 bits. An accumulator and a
    residual stream differ by orders of magnitude, so no one shift lets both fill int32.

    Raises:
        FoldError: if the values exceed what the contract's integers can hold.
    """
    if not (unit > 0 and math.isfinite(unit)):
        raise FoldError(f"layer {_names(affine)}: the step {unit} is not a positive number")
    if affine.low != -math.inf:
        low = max(low, min(high, round_to_unit(affine.low, unit)))
    if affine.high != math.inf:
        high = min(high, max(low, round_to_unit(affine.high, unit)))
    ratios = [term.coefficient / unit for term in affine.terms]
    constant = affine.constant / unit
    sums: Array = np.abs(constant) + 1.0
    for ratio, term in zip(ratios, affine.terms, strict=True):
        sums = sums + np.abs(ratio) * np.maximum(np.abs(term.low), np.abs(term.high))
    largest = [float(np.abs(ratio).max()) for ratio in ratios]
    if not (np.isfinite(sums).all() and np.isfinite(largest).all()):
        raise FoldError(f"layer {_names(affine)}: parameters hold NaN or infinity")
    # one bit of room each for the rounding of the multipliers
    shift = EPILOGUE_BITS - 1 - math.ceil(math.log2(float(sums.max())))
    exponents = [math.ceil(math.log2(one)) + 1 for one in largest if one > 0]
    shift = min(shift, EPILOGUE_BITS, max(0, MULTIPLIER_BITS - min(exponents, default=0)))
    if shift < 0:
        raise FoldError(
            f"layer {_names(affine)}: values reach 2^{math.log2(float(sums.max())):.0f} steps of {unit:g}; "
            "the step is too small for this layer: calibrate it again"
        )
    multipliers = tuple(_multiplier(ratio, shift) for ratio in ratios)
    half = 2 ** (shift - 1) if shift else 0
    rounded = np.rint(np.ldexp(constant, shift)).astype(np.int64) + half
    return Epilogue(multipliers, np.asarray(rounded, np.int64), shift, low, high, unit)


def _names(affine: Affine) -> str:
    return " + ".join(repr(name) for name in affine.layers) or "'input'"


def _multiplier(ratio: Array, shift: int) -> NDArray[np.int64]:
    """ratio * 2^shift, rounded to 31 bits of the largest channel."""
    largest = float(np.abs(ratio).max())
    excess = shift + math.ceil(math.log2(largest)) + 1 - MULTIPLIER_BITS if largest > 0 else 0
    zeros = max(0, excess)
    return np.asarray(np.rint(np.ldexp(ratio, shift - zeros)).astype(np.int64) << zeros)


def wide_epilogue(affine: Affine) -> Epilogue:
    """An epilogue that keeps the tensor at high precision: `wide_bits` is the magnitude that spans its range.

    The unit is a power of two times that of the summand with the widest range among those with one factor for
    all channels, so a residual stream goes through its sums without being rounded.
    """
    low, high = affine.real_range()
    reach = max(abs(float(low.min())), abs(float(high.max())))
    whole = replace(affine, low=-math.inf, high=math.inf).real_range()
    largest = max(abs(float(whole[0].min())), abs(float(whole[1].max())))
    if not math.isfinite(largest):
        raise FoldError(f"layer {_names(affine)}: parameters hold NaN or infinity")
    # a clip may leave a sliver of what the sums reach, and sums have 52 bits
    reach = max(reach, largest * 2.0 ** (affine.wide_bits - WIDE_SUM_BITS))
    streams = [term for term in affine.terms if term.coefficient.ndim == 0 and float(term.coefficient)]
    base = reach or 1.0
    if streams and reach > 0:
        widest = max(streams, key=lambda term: float(np.ptp(term.real_range())))
        base = abs(float(widest.coefficient))
    unit = math.ldexp(base, math.ceil(math.log2(reach / base)) - affine.wide_bits) if reach > 0 else 1.0
    return integer_epilogue(
        affine, unit, round_to_unit(float(low.min()), unit), round_to_unit(float(high.max()), unit)
    )


def stream_epilogue(affine: Affine, unit: float) -> Epilogue:
    """An epilogue in the unit of a stream, or a power of two times that for ranges beyond 2^29 steps."""
    low, high = (float(end) for end in (affine.real_range()[0].min(), affine.real_range()[1].max()))
    reach = max(abs(low), abs(high))
    if reach > 0:
        unit = math.ldexp(unit, max(0, math.ceil(math.log2(reach / unit)) - WIDE_BITS))
    return integer_epilogue(affine, unit, round_to_unit(low, unit), round_to_unit(high, unit))


def broadcastable(values: Any, rank: int, axis: int) -> NDArray[Any]:
    """Per-channel values shaped to broadcast against a tensor of `rank` dimensions along `axis`."""
    array = np.asarray(values)
    return array if array.ndim == 0 else array.reshape(-1, *([1] * (rank - 1 - axis)))
