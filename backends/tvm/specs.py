"""What kernels compute, as plain records: no TVM here, so that a plan can be made and read without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .maps import Map
from .packing import Runs

#: Stands for a layer's own accumulators among the terms of an output.
ACCUMULATOR = -1


@dataclass(frozen=True)
class Requantised:
    """One tensor of an epilogue: clip(floor(constant + sum of multiplier * term), low, high).

    Attributes:
        map: where it goes.
        terms: `ACCUMULATOR`, or the position of another input.
        low, high: clip.
    """

    map: Map
    terms: tuple[int, ...]
    low: int
    high: int

    @property
    def stored(self) -> tuple[int, int]:
        """Least and largest value in memory."""
        return self.low, self.high


@dataclass(frozen=True)
class Output(Requantised):
    """In float64, and with an offset.

    The constants are float64 and hold integers times 2^-shift: (1 + terms, channels), first the constant,
    then one row of multipliers per term. Every partial sum is an integer below 2^53 times 2^-shift, so
    float64 is exact and may be contracted.

    Attributes:
        offset: what makes it what is stored.
        is_bounded: whether the floor is known to fit int32 before the clip.
    """

    offset: int = 0
    is_bounded: bool = False

    #: Element type of the constants.
    dtype: ClassVar[str] = "float64"

    @property
    def constants(self) -> tuple[int, int]:
        """Shape of the array of constants."""
        return 1 + len(self.terms), self.map.padded

    @property
    def stored(self) -> tuple[int, int]:
        """Least and largest value in memory."""
        return self.low + self.offset, self.high + self.offset


@dataclass(frozen=True)
class Scaled(Requantised):
    """Codes of one term, none below 0, in float32.

    The constants are float32: (2, channels), first the constant, then the multiplier. They are such that one
    fused multiplication in float32 gives the right code for every int32, see `scaled.in_float32`.
    """

    #: Element type of the constants.
    dtype: ClassVar[str] = "float32"

    @property
    def constants(self) -> tuple[int, int]:
        """Shape of the array of constants."""
        return 2, self.map.padded


@dataclass(frozen=True)
class Shifted(Requantised):
    """In integers of 64 bits: clip((constant + sum of multiplier * (term << lift)) >> shift, low, high).

    A term with one power of two for all channels may join behind the shift instead, in 32 bits:
    clip((((constant + ...) >> shift) + added) >> last_shift, low, high).

    The constants are int32: two rows that hold the int64 constants, of the even channels and then of the odd
    ones, and a row of multipliers per term: (2 + terms, channels). They are made by `shifted.in_integers`.
    What is clipped fits int32, and so do every lifted term and what is added.

    Attributes:
        lifts: by term.
        shift: of the sum.
        added: the position of another input, or None.
        last_shift: of what it was added to.
    """

    lifts: tuple[int, ...]
    shift: int
    added: int | None = None
    last_shift: int = 0

    #: Element type of the constants.
    dtype: ClassVar[str] = "int32"

    @property
    def constants(self) -> tuple[int, int]:
        """Shape of the array of constants."""
        return 2 + len(self.terms), self.map.padded


@dataclass(frozen=True)
class Steps:
    """One tensor of codes that an epilogue writes: low + number of thresholds that sign * term reaches.

    The constants are int32: (1 + levels, channels), first the signs, then the ascending thresholds. What the
    term differs by from the tensor that it stands for is part of them.

    Attributes:
        map: where it goes.
        term: `ACCUMULATOR`, or the position of another input.
        levels: thresholds per channel.
        low: code when none is reached.
    """

    map: Map
    term: int
    levels: int
    low: int

    #: Element type of the constants.
    dtype: ClassVar[str] = "int32"

    @property
    def stored(self) -> tuple[int, int]:
        """Least and largest value in memory."""
        low = self.low + self.map.zero_point
        return low, low + self.levels

    @property
    def constants(self) -> tuple[int, int]:
        """Shape of the array of constants."""
        return 1 + self.levels, self.map.padded


@dataclass(frozen=True)
class Sums:
    """The accumulators of a layer, for others to read: accumulator + constant.

    The constants are int32: (1, channels).

    Attributes:
        map: where it goes.
    """

    map: Map

    #: Element type of the constants.
    dtype: ClassVar[str] = "int32"

    @property
    def stored(self) -> tuple[int, int]:
        """Least and largest value in memory."""
        return -(2**31), 2**31 - 1

    @property
    def constants(self) -> tuple[int, int]:
        """Shape of the array of constants."""
        return 1, self.map.padded


#: What an epilogue writes.
Written = Output | Scaled | Shifted | Steps | Sums


@dataclass(frozen=True)
class Layer:
    """A quantised convolution or linear layer with everything behind it.

    Attributes:
        source: codes that it reads.
        runs: how.
        stride, dilation: of rows and columns.
        padding: (top, left), at most the source's border.
        h, w: extents of the output.
        highest: largest stored code of the source, zero point included.
        bits, signed: of the weight codes.
        numerator, shift: effective weights are 2^shift * code + numerator.
        is_depthwise: whether output i reads channel i alone.
        outputs: what it writes.
        others: further tensors that its outputs add.
        multiplied: inputs that share a multiplier per output, whose bytes follow the packed weights as
            (blocks, parts, 16); 0 where there are none.
        replaced: position of the one among `others` that the last output is written over, or None.
    """

    source: Map
    runs: Runs
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int]
    h: int
    w: int
    highest: int
    bits: int
    signed: bool
    numerator: int
    shift: int
    is_depthwise: bool
    outputs: tuple[Written, ...]
    others: tuple[Map, ...]
    multiplied: int = 0
    replaced: int | None = None

    @property
    def code_range(self) -> tuple[int, int]:
        """Lowest and highest weight code."""
        return (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1) if self.signed else (0, 2**self.bits - 1)

    @property
    def effective_range(self) -> tuple[int, int]:
        """Lowest and highest effective weight."""
        low, high = self.code_range
        return (low << self.shift) + self.numerator, (high << self.shift) + self.numerator

    @property
    def is_effective(self) -> bool:
        """Whether effective weights fit int8, so that kernels multiply them and not the codes."""
        low, high = self.effective_range
        return low >= -128 and high <= 127

    @property
    def code_bits(self) -> int:
        """Bits of a stored code of the source."""
        return max(1, self.highest.bit_length())

    @property
    def largest_weight(self) -> int:
        """Largest magnitude of what kernels multiply by: effective weights, or codes."""
        return max(abs(one) for one in (self.effective_range if self.is_effective else self.code_range))

    @property
    def is_grouped(self) -> bool:
        """Whether an output reads only some of the channels."""
        return self.runs.channels != self.source.padded or len(set(self.runs.first)) > 1

    @property
    def blocks(self) -> int:
        """Blocks of 16 outputs."""
        return len(self.runs.first)
