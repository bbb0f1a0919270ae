"""The schemes' quantisers as their papers state them, in numpy float64, for prepared models.

A scheme adds an entry with `register_formulas`. For a scheme without one, `verify` takes the codes that its
own quantisers declare, still checks every fold against the real chain, and says so in the report.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..model import QuantModel
from ..modes import FLOAT_BITS, Mode
from ..passes.calibrated_ends import is_calibrated
from ..passes.layers import QuantizedLayer
from ..passes.quantized_tensor import QuantizedTensor
from ..passes.quantizers import ActivationQuantizer, FloatRange, ThresholdGrid, WeightQuantizer
from .chain import as_array
from .reference_values import ReferenceGrid, ReferenceRange, ReferenceThresholds, ReferenceWeight

#: What holds a weight quantiser and the latent weight.
Weighted: TypeAlias = QuantizedLayer | QuantizedTensor


class SchemeFormulas(Protocol):
    """What `verify` knows of one scheme."""

    def weight(self, model: QuantModel, layer: Weighted, mode: Mode) -> ReferenceWeight | NDArray[np.float64]:
        """The integers of a layer's weight in one mode, from its latent weight; real in a float mode."""

    def activation(
        self, model: QuantModel, quantizer: ActivationQuantizer, mode: Mode
    ) -> ReferenceGrid | ReferenceThresholds | ReferenceRange | None:
        """The grid of an activation quantiser in one mode; None if it is not uniform."""


class DeclaredFormulas:
    """What the scheme's own quantisers declare; not independent of the conversion."""

    def weight(self, model: QuantModel, layer: Weighted, mode: Mode) -> ReferenceWeight | NDArray[np.float64]:
        """The quantiser's codes."""
        codes = layer.weight_quantizer.codes(layer.weight.detach(), model.row(mode))
        if isinstance(codes, Tensor):
            return as_array(codes).astype(np.float64)
        scale = as_array(codes.scale).astype(np.float64)
        integers = as_array(codes.codes).astype(np.int64)
        centre = 0.0 if codes.centre is None else as_array(codes.centre).astype(np.float64)
        return ReferenceWeight(integers, scale, codes.offset_numerator, codes.offset_shift, centre)

    def activation(
        self, model: QuantModel, quantizer: ActivationQuantizer, mode: Mode
    ) -> ReferenceGrid | ReferenceThresholds | ReferenceRange | None:
        """The quantiser's grid."""
        grid = quantizer.grid(model.row(mode))
        if isinstance(grid, FloatRange):
            return ReferenceRange(grid.low, grid.high)
        if isinstance(grid, ThresholdGrid):
            thresholds = np.asarray(grid.thresholds, np.float64)
            return ReferenceThresholds(grid.scale, grid.low, grid.high, thresholds, grid.before)
        return ReferenceGrid(grid.scale, grid.low, grid.high, grid.spacing, grid.start)


class VerticalFormulas:
    """Vertical layering: Eq. 1 at K bits, Eq. 5 for the dropped bits, Eq. 6 for the compensation z_b."""

    #: Steps are held at least this large.
    smallest_step = 1e-8

    def weight(self, model: QuantModel, layer: Weighted, mode: Mode) -> ReferenceWeight:
        """c_b = floor(clip(round(W / s), -2^(K-1), 2^(K-1) - 1) / 2^d), s_b = 2^d s, z_b = (1 - 2^-d) / 2.

        Steps s of the groups of a channel, where codes are multiplied with codes, are 1 to 15 units.
        """
        quantizer: Any = layer.weight_quantizer
        highest = max(quantizer.bits)
        dropped = highest - quantizer.bits[model.row(mode)]
        steps = np.maximum(as_array(quantizer.step).astype(np.float64), np.float32(self.smallest_step))
        multipliers, units = None, None
        if quantizer.is_multiplied:
            per_channel = steps.reshape(len(layer.weight), -1)
            units = per_channel.max(1) / 15
            multipliers = np.clip(np.rint(per_channel / units[:, None]), 1, 15).astype(np.int64)
            steps = (units[:, None] * multipliers).reshape(-1)
        latent = as_array(layer.weight).astype(np.float64)
        centres = np.zeros((1, 1)) if quantizer.centres is None else as_array(quantizer.centres)[:, None]
        ratio = ((latent.reshape(len(steps), -1) - centres) / steps[:, None]).reshape(latent.shape)
        groups = len(steps) // len(latent)
        shape = () if len(steps) == 1 else (-1, groups) if groups > 1 else (-1,)
        step = steps.reshape(shape) if units is None else units
        code = np.clip(np.rint(ratio), -(2 ** (highest - 1)), 2 ** (highest - 1) - 1).astype(np.int64)
        numerator, shift = (2**dropped - 1, dropped + 1) if dropped and quantizer.compensation else (0, 0)
        centre = 0.0 if quantizer.centres is None else centres.astype(np.float64).reshape(shape)
        scale = np.asarray(step * 2.0**dropped)
        return ReferenceWeight(code >> dropped, scale, numerator, shift, centre, multipliers)

    def activation(
        self, model: QuantModel, quantizer: ActivationQuantizer, mode: Mode
    ) -> ReferenceGrid | ReferenceRange | None:
        """2^b codes from the lowest one on; unsigned where the tensor cannot be negative."""
        if mode.is_weight_only:
            return ReferenceRange(-math.inf, math.inf)
        given: Any = quantizer
        step = max(float(as_array(given.step)[model.row(mode)]), float(np.float32(self.smallest_step)))
        bits = given.bits[model.row(mode)]
        low = int(as_array(given.lows)[model.row(mode)]) if given.signed else 0
        return ReferenceGrid(step, low, low + 2**bits - 1)


class QuantizableFormulas:
    """Quantizable networks: Eq. 7 on tanh-normalised weights and clipped activations; 32 bits stay float."""

    def weight(self, model: QuantModel, layer: Weighted, mode: Mode) -> ReferenceWeight | NDArray[np.float64]:
        """c = clip(floor(2^b r), 0, 2^b - 1) for r = tanh(W) / (2 max|tanh W|) + 1/2, or a smaller range."""
        squashed = np.tanh(as_array(layer.weight).astype(np.float64))
        largest, deviations = float(np.abs(squashed).max()), model.scheme.config.weight_deviations
        if deviations is not None:
            largest = min(largest, deviations * float(np.sqrt(np.mean(squashed**2))))
        ratio = squashed / (2.0 * max(largest, 1e-12)) + 0.5
        if mode.is_float:
            return np.clip(2.0 * ratio - 1.0, -1.0, 1.0)
        bits = mode.weight_bits
        code = np.clip(np.floor(ratio * 2.0**bits), 0, 2**bits - 1).astype(np.int64)
        # in two's complement: the first bit is inverted, which adds 2^(b-1) to the offset -(2^b - 1) / 2
        return ReferenceWeight(code - 2 ** (bits - 1), np.asarray(2.0 / (2**bits - 1)), 1, 1)

    def activation(
        self, model: QuantModel, quantizer: ActivationQuantizer, mode: Mode
    ) -> ReferenceGrid | ReferenceThresholds | ReferenceRange | None:
        """Code k begins at s k / 2^b and stands for s k / (2^b - 1)."""
        given: Any = quantizer
        size, bits = float(as_array(given.size)[0]), mode.activation_bits
        if mode.is_float:
            return ReferenceRange(0.0, size)
        return ReferenceGrid(size / (2**bits - 1), 0, 2**bits - 1, size / 2**bits)


class N2UQFormulas:
    """N2UQ: thresholds in the middle of learned intervals; weights over 2^b levels of [-alpha, alpha]."""

    def weight(self, model: QuantModel, layer: Weighted, mode: Mode) -> ReferenceWeight:
        """c = round((clip(W / alpha, -1, 1) + 1) (2^b - 1) / 2), alpha = (2^b - 1) / 2^(b-1) mean|W|."""
        quantizer: Any = layer.weight_quantizer
        bits, weight = mode.weight_bits, as_array(layer.weight).astype(np.float64)
        levels = 2**bits - 1
        if quantizer.rescale:
            means = np.maximum(np.abs(weight.reshape(len(weight), -1)).mean(1), 1e-12)
            alpha = levels / 2.0 ** (bits - 1) * means
            ratio = weight / alpha.reshape(-1, *[1] * (weight.ndim - 1))
        else:
            squashed = np.tanh(weight)
            alpha, ratio = np.ones(()), squashed / max(float(np.abs(squashed).max()), 1e-12)
        code = np.rint((np.clip(ratio, -1.0, 1.0) + 1.0) * (levels / 2.0)).astype(np.int64)
        return ReferenceWeight(code - 2 ** (bits - 1), np.asarray(alpha * 2.0 / levels), 1, 1)

    def activation(
        self, model: QuantModel, quantizer: ActivationQuantizer, mode: Mode
    ) -> ReferenceThresholds:
        """T_1 = start + a_1 / 2, T_(i+1) = T_i + (a_i + a_(i+1)) / 2; values beta2 * code * 2 / (2^b - 1)."""
        given: Any = quantizer
        row, levels = model.row(mode), 2**mode.activation_bits - 1
        smallest = model.scheme.config.smallest_interval
        intervals = np.maximum(as_array(given.interval).astype(np.float64)[row, :levels], smallest)
        start, before, after = (float(as_array(one)[row]) for one in (given.start, given.before, given.after))
        steps = np.concatenate([[start + intervals[0] / 2], (intervals[:-1] + intervals[1:]) / 2])
        return ReferenceThresholds(after * 2.0 / levels, 0, levels, np.cumsum(steps), before)


class MultiBranchFormulas:
    """MBQuant: Eq. 1, equal parts between bounds; weights of 2 bits in every branch and mode."""

    #: Bounds are held at least this far apart.
    smallest_width = 1e-6

    def weight(self, model: QuantModel, layer: Weighted, mode: Mode) -> ReferenceWeight:
        """c = round((2^b - 1) clip((W - l) / (u - l), 0, 1)), value 2 c / (2^b - 1) - 1."""
        quantizer: Any = layer.weight_quantizer
        lower, upper = self._bounds(quantizer, 0)
        bits: int = quantizer.bits
        ratio = (as_array(layer.weight).astype(np.float64) - lower) / (upper - lower)
        code = np.rint((2**bits - 1) * np.clip(ratio, 0.0, 1.0)).astype(np.int64)
        return ReferenceWeight(code - 2 ** (bits - 1), np.asarray(2.0 / (2**bits - 1)), 1, 1)

    def activation(self, model: QuantModel, quantizer: ActivationQuantizer, mode: Mode) -> ReferenceGrid:
        """Code k begins half a part below l + k (u - l) / (2^b - 1) and stands for k / (2^b - 1)."""
        lower, upper = self._bounds(quantizer, model.row(mode))
        parts = 2**mode.activation_bits - 1
        spacing = (upper - lower) / parts
        return ReferenceGrid(1.0 / parts, 0, parts, spacing, lower - spacing / 2)

    def _bounds(self, quantizer: Any, row: int) -> tuple[float, float]:
        lower, upper = (float(as_array(one)[row]) for one in (quantizer.lower, quantizer.upper))
        return lower, max(upper, lower + self.smallest_width)


class CoupledFormulas:
    """Weight coupling: Eq. 1 with a learned step for every bit-width, of weights and of activations."""

    smallest_step = VerticalFormulas.smallest_step

    def weight(self, model: QuantModel, layer: Weighted, mode: Mode) -> ReferenceWeight:
        """c = clip(round(W / s_b), -2^(b-1), 2^(b-1) - 1)."""
        quantizer: Any = layer.weight_quantizer
        bits = quantizer.bits[model.row(mode)]
        step = self._step(quantizer, bits)
        code = np.clip(
            np.rint(as_array(layer.weight).astype(np.float64) / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        )
        return ReferenceWeight(code.astype(np.int64), np.asarray(step), 0, 0)

    def activation(self, model: QuantModel, quantizer: ActivationQuantizer, mode: Mode) -> ReferenceGrid:
        """2^b codes from the lowest one on; unsigned where the tensor cannot be negative."""
        given: Any = quantizer
        bits = given.bits[model.row(mode)]
        low = int(as_array(given.lows)[sorted(set(given.bits)).index(bits)]) if given.signed else 0
        return ReferenceGrid(self._step(given, bits), low, low + 2**bits - 1)

    def _step(self, quantizer: Any, bits: int) -> float:
        steps = as_array(quantizer.step).astype(np.float64)
        return max(
            float(steps[sorted(set(quantizer.bits)).index(bits)]), float(np.float32(self.smallest_step))
        )


class CalibratedFormulas:
    """`first_last="int8"` of any scheme: 8 bits, a scale per output channel of weights, a step of inputs."""

    smallest_step = VerticalFormulas.smallest_step

    def weight(self, model: QuantModel, layer: Weighted, mode: Mode) -> ReferenceWeight | NDArray[np.float64]:
        """c = round(W / s) for s = max|W| / 127 over each channel, or over all where a channel is zero."""
        weight = as_array(layer.weight).astype(np.float64)
        if mode.is_float:
            return weight
        largest = np.abs(weight.reshape(len(weight), -1)).max(1)
        scale = np.maximum(np.where(largest > 0, largest, largest.max()) / 127, self.smallest_step)
        code = np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1)))
        return ReferenceWeight(code.astype(np.int64), scale, 0, 0)

    def activation(
        self, model: QuantModel, quantizer: ActivationQuantizer, mode: Mode
    ) -> ReferenceGrid | ReferenceRange:
        """-128 .. 127, or 0 .. 255 where the tensor cannot be negative."""
        if mode.activation_bits == FLOAT_BITS:
            return ReferenceRange(-math.inf, math.inf)
        given: Any = quantizer
        steps = as_array(given.step).astype(np.float64)
        row = 0 if given.shared else model.row(mode)
        step = max(float(steps[row]), float(np.float32(self.smallest_step)))
        return ReferenceGrid(step, -128, 127) if given.signed else ReferenceGrid(step, 0, 255)


_CALIBRATED = CalibratedFormulas()

_FORMULAS: dict[str, SchemeFormulas] = {
    "vertical": VerticalFormulas(),
    "quantizable": QuantizableFormulas(),
    "n2uq": N2UQFormulas(),
    "multibranch": MultiBranchFormulas(),
    "coupled": CoupledFormulas(),
}


def register_formulas(scheme: str, formulas: SchemeFormulas) -> None:
    """Let `verify` recompute a scheme's quantisers independently; the name is that of the scheme."""
    _FORMULAS[scheme] = formulas


def formulas_of(quantizer: WeightQuantizer | ActivationQuantizer, scheme: SchemeFormulas) -> SchemeFormulas:
    """A quantiser's formulas: those of its scheme, unless it came by `first_last="int8"`."""
    return _CALIBRATED if is_calibrated(quantizer) else scheme


def find_formulas(scheme: str) -> SchemeFormulas | None:
    """A scheme's formulas, or None if it has registered none."""
    return _FORMULAS.get(scheme)
