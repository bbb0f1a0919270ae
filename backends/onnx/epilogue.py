"""`requantize`, `quantize` and `dequantize`: sums of scaled integers in float32, rounded where codes follow.

A requantisation (sum m_i a_i + c) >> e is evaluated as a sum of float tensors in real units: every integer
tensor of the ONNX graph stands for integer times unit, so the summands of a residual need no scaling, and the
accumulators get scale and offset of their channel while they are still a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from qcompile.errors import LoweringError

from .accumulate import emit_fused
from .emit import Deviation, Emitter, layer_of
from .forms import (
    affine,
    as_real,
    channels_first,
    channels_last,
    is_per_channel,
    quantized,
    scaled,
    zero_point_of,
)
from .fused import ROUNDING
from .values import Accumulators, Array, Codes, Constant, Deferred, Plain, Real, Value, as_stored, scalar
from .weights import real_weight

#: Relative difference up to which a factor counts as 1, and two requantisations share one sum. Their integer
#: multipliers are rounded by up to this much; what is left out is part of the stated error.
NEGLIGIBLE = 2.0**-20


@dataclass(frozen=True)
class _Sum:
    """sum(ratio_i * tensor_i) + offset, of a rank, with channels in the last dimension or not."""

    terms: tuple[Accumulators | Real, ...]
    ratios: tuple[Array, ...]
    offset: Array
    rank: int
    last: bool

    def difference(self, other: _Sum) -> float:
        """The largest relative difference of their constants; infinite for other tensors or shapes."""
        if [term.name for term in self.terms] != [term.name for term in other.terms]:
            return float("inf")
        pairs = [*zip(self.ratios, other.ratios, strict=True), (self.offset, other.offset)]
        return max(_difference(a, b) for a, b in pairs)


def _difference(a: Array, b: Array) -> float:
    if a.shape != b.shape:
        return float("inf")
    largest = np.maximum(np.abs(a), np.abs(b))
    return float(np.max(np.abs(a - b) / np.where(largest > 0, largest, 1.0), initial=0.0))


def requantize(emitter: Emitter, node: fx.Node) -> Value:
    """Emit the normative epilogue; codes become uint8, wide integers float32."""
    low, high = int(node.args[4]), int(node.args[5])
    layer, zero = layer_of(node), zero_point_of(low)
    first = emitter.value(node.args[0][0])
    if isinstance(first, Deferred):
        stored = emit_fused(emitter, node.args[0][0], node, first, _unclipped_name(node, zero))
        return _as_codes(emitter, stored, node, zero)
    unit = float(node.meta.get("unit", 1.0))
    name, last = _real_value(emitter, node, unit, low, high)
    if high - low > 255:
        return Real(name, emitter.shape(node), scalar(unit), scalar(low), scalar(high), last)
    stored = quantized(emitter, name, unit, zero, _unclipped_name(node, zero), layer)
    return _as_codes(emitter, stored, node, zero, last)


def _as_codes(emitter: Emitter, stored: str, node: fx.Node, zero: int, last: bool = False) -> Codes:
    """Clip uint8 codes to their range; QuantizeLinear has clipped to 0..255."""
    layer, unit = layer_of(node), float(node.meta.get("unit", 1.0))
    low, high = int(node.args[-2]), int(node.args[-1])
    if _clips(low, high, zero):
        bounds = [
            emitter.builder.initializer(f"{layer}/{what}", value + zero, np.uint8)
            for what, value in (("lowest_code", low), ("highest_code", high))
        ]
        stored = emitter.builder.node("Clip", [stored, *bounds], node.name, f"{layer}/clip")
    return Codes(stored, emitter.shape(node), unit, zero, low, high, last)


def _clips(low: int, high: int, zero: int) -> bool:
    return low + zero > 0 or high + zero < 255


def _unclipped_name(node: fx.Node, zero: int) -> str:
    """Name of the codes as QuantizeLinear writes them; the final ones are called like the node."""
    return f"{node.name}.rounded" if _clips(int(node.args[-2]), int(node.args[-1]), zero) else node.name


# ---- sums in float ----------------------------------------------------------------------------------------


def _real_value(emitter: Emitter, node: fx.Node, unit: float, low: int, high: int) -> tuple[str, bool]:
    """The requantisation in real units, clipped where a clip acts; records the error.

    Returns:
        The tensor, and whether its channels are in the last dimension.
    """
    inputs, multipliers, constant, shift = node.args[:4]
    values = [emitter.value(one) for one in inputs]
    factors = [emitter.constant(one).astype(np.float64) for one in multipliers]
    half = 2 ** (shift - 1) if shift else 0
    offset = np.ldexp((emitter.constant(constant).astype(np.int64) - half).astype(np.float64), -shift) * unit
    terms: list[Accumulators | Real] = []
    ratios: list[Array] = []
    skipped = 0.0
    for value, factor in zip(values, factors, strict=True):
        term = value if isinstance(value, Accumulators) else as_real(emitter, value)
        ratio = np.ldexp(factor, -shift) * unit / term.factor
        if isinstance(term, Accumulators) and not is_per_channel(term, ratio):
            term = as_real(emitter, term)
        if (np.abs(ratio - 1.0) <= NEGLIGIBLE).all():
            skipped = max(skipped, float(np.max(np.abs(ratio - 1.0))))
            ratio = np.ones(())
        terms.append(term)
        ratios.append(ratio)
    rank = len(emitter.shape(node))
    last = any(_is_last(term) for term in terms) and all(len(term.shape) == rank for term in terms)
    sums = _Sum(tuple(_in_order(emitter, term, last) for term in terms), tuple(ratios), offset, rank, last)
    name, difference = _emit_sum(emitter, sums, layer_of(node), node.name)
    relative = skipped + difference
    emitter.lowered.deviations[node.name] = _deviation(terms, factors, shift, relative, offset / unit)
    return _clipped(emitter, name, sums, unit, shift, (low, high), layer_of(node)), last


def _is_last(term: Accumulators | Real) -> bool:
    return term.is_conv if isinstance(term, Accumulators) else term.last


def _in_order(emitter: Emitter, term: Accumulators | Real, last: bool) -> Accumulators | Real:
    """A summand with its dimensions in the order of the sum."""
    if isinstance(term, Accumulators):
        return term if term.is_conv == last else channels_first(emitter, as_real(emitter, term))
    return channels_last(emitter, term) if last else channels_first(emitter, term)


def _deviation(
    terms: Sequence[Accumulators | Real], factors: Sequence[Array], shift: int, skipped: float, offset: Array
) -> Deviation:
    """Bound of the float evaluation's error, in output units.

    Relative to the sum of absolute summands: every summand is converted, scaled and its scale rounded (3),
    every partial sum, the offset and its addition round (summands + 1), so do the unit and the division by it
    (2); factors that were left out (`skipped`). Absolute: what convolutions in float round, with which
    runtimes merge the factor and the offset.
    """
    absolute: Array = np.zeros(())
    for term, factor in zip(terms, factors, strict=True):
        scale = np.ldexp(np.abs(factor), -shift)
        merged = term.merged_rounding(offset / np.where(scale > 0, scale, np.inf))
        absolute = absolute + scale * np.maximum(term.rounding, merged)
    return Deviation((3 + len(terms) + 1 + 2) * ROUNDING + skipped, absolute)


def _emit_sum(emitter: Emitter, sums: _Sum, layer: str, output: str) -> tuple[str, float]:
    """The sum as a float tensor, or one that another reader has, and the relative difference to that."""
    emitted: list[tuple[_Sum, str]] = emitter.once("float sums", list)
    for known, name in emitted:
        if known.difference(sums) <= NEGLIGIBLE:
            return name, known.difference(sums)
    pending = sums.offset
    parts = []
    for index, (term, ratio) in enumerate(zip(sums.terms, sums.ratios, strict=True)):
        what = f"term_{index}"
        if not isinstance(term, Accumulators):
            parts.append(scaled(emitter, term, ratio, layer, what))
            continue
        takes = is_per_channel(term, pending)
        added, pending = (pending, scalar(0.0)) if takes else (scalar(0.0), pending)
        parts.append(affine(emitter, term, ratio, added, f"{output}.{what}", layer, what))
    total, builder = parts[0], emitter.builder
    for index, part in enumerate(parts[1:]):
        total = builder.node("Add", [total, part], f"{output}.sum_{index}", f"{layer}/add_{index}")
    if (pending != 0.0).any():
        offset = builder.initializer(f"{layer}/offset", as_stored(pending, sums.rank, sums.last), np.float32)
        total = builder.node("Add", [total, offset], f"{output}.biased", f"{layer}/add_offset")
    emitted.append((sums, total))
    return total, 0.0


def _clipped(
    emitter: Emitter, name: str, sums: _Sum, unit: float, shift: int, bounds: tuple[int, int], layer: str
) -> str:
    """Apply the clips that act, in float; codes are clipped later, but share a ReLU with wide readers."""
    low, high = bounds
    if high - low <= 255:
        return _relu(emitter, name, layer) if low == 0 else name
    smallest = largest = sums.offset
    slack = 2 * unit  # multipliers are rounded, so bounds of the real tensor are met only nearly
    for term, ratio in zip(sums.terms, sums.ratios, strict=True):
        ends = ratio * term.factor * term.low, ratio * term.factor * term.high
        smallest, largest = smallest + np.minimum(*ends), largest + np.maximum(*ends)
        slack += unit * float(np.ldexp(max(np.max(np.abs(term.low)), np.max(np.abs(term.high))), -shift))
    builder = emitter.builder
    if float(np.min(smallest)) < low * unit - slack:
        if low == 0:
            name = _relu(emitter, name, layer)
        else:
            bound = builder.initializer(f"{layer}/lower_bound", low * unit, np.float32)
            name = builder.node("Max", [name, bound], f"{name}.above", f"{layer}/maximum")
    if float(np.max(largest)) > high * unit + slack:
        bound = builder.initializer(f"{layer}/upper_bound", high * unit, np.float32)
        name = builder.node("Min", [name, bound], f"{name}.below", f"{layer}/minimum")
    return name


def _relu(emitter: Emitter, name: str, layer: str) -> str:
    def emit() -> str:
        return emitter.builder.node("Relu", [name], f"{name}.positive", f"{layer}/relu")

    return emitter.once(f"relu of {name}", emit)


# ---- from and to float ------------------------------------------------------------------------------------


def quantize(emitter: Emitter, node: fx.Node) -> Value:
    """Emit float to codes, or to integers with high precision."""
    source, step, low, high = node.args
    layer, low, high = layer_of(node), int(low), int(high)
    name = emitter.tensor(source)
    if emitter.dtype(source) != np.float32:
        name = emitter.builder.node("Cast", [name], f"{node.name}.float", f"{layer}/cast", to=1)
    if high - low > 255:
        return _fixed_point(emitter, node, name, float(step), low, high)
    zero = zero_point_of(low)
    stored = quantized(emitter, name, step, zero, _unclipped_name(node, zero), layer)
    return _as_codes(emitter, stored, node, zero)


def _fixed_point(emitter: Emitter, node: fx.Node, source: str, step: float, low: int, high: int) -> Real:
    """Integers with high precision of a float tensor, in float32, rounded as the contract rounds them."""
    layer, builder = layer_of(node), emitter.builder
    divisor = builder.initializer(f"{layer}/scale", step, np.float32)
    bounds = [
        builder.initializer(f"{layer}/{what}", value, np.float32)
        for what, value in (("lowest", low), ("highest", high))
    ]
    steps = builder.node("Div", [source, divisor], f"{node.name}.steps", f"{layer}/divide")
    rounded = builder.node("Round", [steps], f"{node.name}.rounded", f"{layer}/round")
    name = builder.node("Clip", [rounded, *bounds], node.name, f"{layer}/clip")
    return Real(name, emitter.shape(node), scalar(1.0), scalar(low), scalar(high))


def dequantize(emitter: Emitter, node: fx.Node) -> Value:
    """Emit integers to float: value * scale + bias."""
    layer, value = layer_of(node), emitter.value(node.args[0])
    if isinstance(value, Constant):
        return Plain(real_weight(emitter, node, value.array))
    if not isinstance(value, (Accumulators, Codes, Real)):
        raise LoweringError(f"layer {layer!r}: dequantize reads {node.args[0]}, which holds no integers")
    scale, bias = (emitter.constant(one).astype(np.float64) for one in node.args[1:3])
    if isinstance(value, Accumulators) and is_per_channel(value, scale) and is_per_channel(value, bias):
        name = affine(emitter, value, scale, bias, f"{node.name}.values", layer, "dequantize")
        real = Real(name, value.shape, scale, value.low, value.high, last=value.is_conv)
        return Plain(channels_first(emitter, real).name)
    real = channels_first(emitter, as_real(emitter, value))
    ratio: Any = np.asarray(scale / real.factor)
    ratio = np.ones(()) if (np.abs(ratio - 1.0) <= ROUNDING).all() else ratio
    name = scaled(emitter, real, ratio, layer, "scale")
    if (bias != 0.0).any():
        added = emitter.builder.initializer(f"{layer}/bias", bias, np.float32)
        name = emitter.builder.node("Add", [name, added], node.name, f"{layer}/add_bias")
    return Plain(name)
