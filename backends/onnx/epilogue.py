"""`requantize`, `quantize` and `dequantize`: sums of scaled integers in float32, rounded to codes where codes follow.

A requantisation (sum m_i a_i + c) >> e is evaluated as a sum of float tensors in units that make one summand's
factor 1, usually that of the accumulators: their convolution stays exact, the constant becomes its bias, and
runtimes fuse the sum and a ReLU into it. The units differ per channel; QuantizeLinear takes them as its scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from qcompile.errors import LoweringError

from .accumulate import emit_fused
from .emit import Deviation, Emitter, layer_of, zero_point_of
from .fused import ROUNDING
from .thresholds import Staircase
from .values import Array, Codes, Deferred, Plain, Real, Value, scalar

#: Relative difference of constants up to which two requantisations share one sum.
SHARED = 4 * ROUNDING


@dataclass(frozen=True)
class _Sum:
    """sum(ratio_i * tensor_i) + offset, in units of `gauge` output units."""

    terms: tuple[Real, ...]
    ratios: tuple[Array, ...]
    offset: Array
    gauge: Array

    def resembles(self, other: _Sum) -> bool:
        """Whether both are the same sum up to float rounding."""
        if [term.name for term in self.terms] != [term.name for term in other.terms]:
            return False
        pairs = [*zip(self.ratios, other.ratios, strict=True), (self.offset, other.offset)]
        return all(a.shape == b.shape and np.allclose(a, b, rtol=SHARED, atol=0.0) for a, b in pairs)


def requantize(emitter: Emitter, node: fx.Node) -> Value:
    """Emit the normative epilogue; codes become uint8, wide integers float32."""
    inputs, multipliers, constant, shift, low, high = node.args
    layer, low, high = layer_of(node), int(low), int(high)
    narrow = high - low <= 255
    zero = zero_point_of(low)
    first = emitter.value(inputs[0])
    if isinstance(first, Deferred):
        stored = emit_fused(emitter, inputs[0], node, first, _unclipped_name(node, zero))
    else:
        reals = tuple(emitter.integers(emitter.value(one)) for one in inputs)
        factors = [emitter.constant(one).astype(np.float64) for one in multipliers]
        offset = emitter.constant(constant).astype(np.int64)
        sums = _normalised(reals, factors, offset, int(shift))
        if narrow and len(reals) == 1 and len(inputs[0].users) == 1:
            sums, exact = _without_ties(sums, factors[0], offset, int(shift), low, high)
        else:
            exact = np.zeros((), bool)
        emitter.lowered.deviations[node.name] = _deviation(reals, factors, int(shift), exact)
        name = _emit_sum(emitter, sums, layer, node.name)
        name = _clipped(emitter, name, sums, factors, offset, int(shift), (low, high), narrow, layer)
        if not narrow:
            bounds = scalar(low), scalar(high)
            return Real(name, sums.gauge, *bounds)
        stored = emitter.quantized(name, sums.gauge, zero, _unclipped_name(node, zero), layer)
    return _as_codes(emitter, stored, node, zero, low, high)


def _as_codes(emitter: Emitter, stored: str, node: fx.Node, zero: int, low: int, high: int) -> Codes:
    """Clip uint8 codes to their range; QuantizeLinear has clipped to 0..255."""
    layer, unit = layer_of(node), float(node.meta.get("unit", 1.0))
    if _clips(low, high, zero):
        bounds = [
            emitter.builder.initializer(f"{layer}/{what}", value + zero, np.uint8)
            for what, value in (("lowest_code", low), ("highest_code", high))
        ]
        stored = emitter.builder.node("Clip", [stored, *bounds], node.name, f"{layer}/clip")
    return Codes(stored, unit, zero, low, high)


def _clips(low: int, high: int, zero: int) -> bool:
    return low + zero > 0 or high + zero < 255


def _unclipped_name(node: fx.Node, zero: int) -> str:
    """Name of the codes as QuantizeLinear writes them; the final ones are called like the node."""
    return f"{node.name}.rounded" if _clips(int(node.args[-2]), int(node.args[-1]), zero) else node.name


def _normalised(
    terms: tuple[Real, ...], factors: list[Array], constant: Any, shift: int
) -> _Sum:
    """Choose the unit: one whose summand needs no factor, accumulators first."""
    half = 2 ** (shift - 1) if shift else 0
    weights = [np.ldexp(factor, -shift) / term.factor for factor, term in zip(factors, terms, strict=True)]
    offset = np.ldexp((constant - half).astype(np.float64), -shift)
    order = sorted(range(len(terms)), key=lambda i: not terms[i].is_sum)
    chosen = next((i for i in order if (weights[i] != 0.0).all() and _varies_once(weights[i])), None)
    gauge = scalar(1.0) if chosen is None else 1.0 / np.abs(weights[chosen])
    ratios = [weight * gauge for weight in weights]
    if chosen is not None:
        ratios[chosen] = np.sign(weights[chosen])
    return _Sum(terms, tuple(ratios), offset * gauge, np.asarray(gauge))


def _varies_once(factor: Array) -> bool:
    return sum(size > 1 for size in factor.shape) <= 1


def _without_ties(
    sums: _Sum, factor: Array, constant: Any, shift: int, low: int, high: int
) -> tuple[_Sum, Any]:
    """Move the offset of a single exact summand away from ties and rounding, see `thresholds`."""
    term = sums.terms[0]
    whole = bool((np.abs(term.low) < 2**24).all() and (np.abs(term.high) < 2**24).all())
    integer = (np.abs(term.factor) == 1.0).all() and whole and (term.rounding < 0.25).all()
    if not integer or (factor == 0).any():
        return sums, np.zeros((), bool)
    shape = np.broadcast_shapes(factor.shape, constant.shape, term.low.shape, term.factor.shape)
    flat = [np.broadcast_to(one, shape).reshape(-1) for one in (factor, constant, term.low, term.high)]
    sign = np.sign(flat[0])
    bottom, top = np.where(sign < 0, -flat[3], flat[2]), np.where(sign < 0, -flat[2], flat[3])
    stairs = Staircase(
        np.abs(flat[0]).astype(np.int64), flat[1].astype(np.int64), shift, low, high,
        np.floor(bottom).astype(np.int64), np.ceil(top).astype(np.int64),
    )
    scale = 1.0 / np.float32(np.broadcast_to(sums.gauge, shape).reshape(-1)).astype(np.float64)
    offset, exact = stairs.offsets(scale, np.ones(scale.shape, np.int64), whole=False)
    moved = _Sum(sums.terms, sums.ratios, offset.reshape(shape), sums.gauge)
    return moved, exact.reshape(shape)


def _deviation(terms: tuple[Real, ...], factors: list[Array], shift: int, exact: Any) -> Deviation:
    """Bound of the float evaluation's error, in output units.

    Relative to the sum of absolute summands: one rounding of every constant and product (2), of every partial
    sum and the offset (summands + 2), of the unit and the division by it (2), constants shared with another
    requantisation (4). Absolute: what the summands themselves carry, and half a step of every summand, because
    a float tensor stands for the nearest integer.
    """
    relative = (2 + len(terms) + 2 + 2 + 4) * ROUNDING
    absolute: Array = np.zeros(())
    for term, factor in zip(terms, factors, strict=True):
        exact_integers = term.is_sum or (term.factor == 1.0).all()
        error = term.rounding + (0.0 if exact_integers else 0.5)
        absolute = absolute + np.ldexp(np.abs(factor), -shift) * error
    if exact.any():
        # relative errors cannot flip a code of such a channel
        keep = np.where(exact, 0.0, 1.0)
        return Deviation(relative if not exact.all() else 0.0, absolute * keep)
    return Deviation(relative, np.asarray(absolute))


def _emit_sum(emitter: Emitter, sums: _Sum, layer: str, output: str) -> str:
    """The sum as a float tensor; one that was emitted before for another reader is used again."""
    emitted: list[tuple[_Sum, str]] = emitter.once("float sums", list)
    for known, name in emitted:
        if known.resembles(sums):
            return name
    builder = emitter.builder
    parts = [
        emitter.scaled(term, ratio, layer, f"term_{index}")
        for index, (term, ratio) in enumerate(zip(sums.terms, sums.ratios, strict=True))
    ]
    # the offset goes to the first term, where runtimes make it the convolution's bias
    total = parts[0]
    if (sums.offset != 0.0).any():
        offset = builder.initializer(f"{layer}/offset", sums.offset, np.float32)
        total = builder.node("Add", [total, offset], f"{output}.biased", f"{layer}/add_offset")
    for index, part in enumerate(parts[1:]):
        total = builder.node("Add", [total, part], f"{output}.sum_{index}", f"{layer}/add_{index}")
    emitted.append((sums, total))
    return total


def _clipped(
    emitter: Emitter, name: str, sums: _Sum, factors: list[Array], constant: Any, shift: int,
    bounds: tuple[int, int], narrow: bool, layer: str,
) -> str:
    """Apply the clips that act, in float; codes are clipped later."""
    low, high = bounds
    if narrow and low == 0:
        return _relu(emitter, name, layer)
    if narrow:
        return name
    smallest = largest = constant.astype(np.float64)
    slack = 2.0**shift  # multipliers are rounded, so bounds of the real tensor are met only nearly
    for term, factor in zip(sums.terms, factors, strict=True):
        ends = factor * term.low, factor * term.high
        smallest, largest = smallest + np.minimum(*ends), largest + np.maximum(*ends)
        slack += float(max(np.max(np.abs(term.low)), np.max(np.abs(term.high))))
    smallest, largest = np.ldexp(smallest + slack, -shift), np.ldexp(largest - slack, -shift)
    builder = emitter.builder
    if float(np.min(smallest)) < low:
        if low == 0:
            name = _relu(emitter, name, layer)
        else:
            bound = builder.initializer(f"{layer}/lower_bound", low * sums.gauge, np.float32)
            name = builder.node("Max", [name, bound], f"{name}.above", f"{layer}/maximum")
    if float(np.max(largest)) > high:
        bound = builder.initializer(f"{layer}/upper_bound", high * sums.gauge, np.float32)
        name = builder.node("Min", [name, bound], f"{name}.below", f"{layer}/minimum")
    return name


def _relu(emitter: Emitter, name: str, layer: str) -> str:
    def emit() -> str:
        return emitter.builder.node("Relu", [name], f"{name}.positive", f"{layer}/relu")

    return emitter.once(f"relu of {name}", emit)


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
    stored = emitter.quantized(name, step, zero, _unclipped_name(node, zero), layer)
    return _as_codes(emitter, stored, node, zero, low, high)


def _fixed_point(
    emitter: Emitter, node: fx.Node, source: str, step: float, low: int, high: int
) -> Real:
    """Integers with high precision of a float tensor, kept in float32: rounded as the contract rounds them."""
    layer, builder = layer_of(node), emitter.builder
    divisor = builder.initializer(f"{layer}/scale", step, np.float32)
    bounds = [
        builder.initializer(f"{layer}/{what}", value, np.float32)
        for what, value in (("lowest", low), ("highest", high))
    ]
    steps = builder.node("Div", [source, divisor], f"{node.name}.steps", f"{layer}/divide")
    rounded = builder.node("Round", [steps], f"{node.name}.rounded", f"{layer}/round")
    name = builder.node("Clip", [rounded, *bounds], node.name, f"{layer}/clip")
    return Real(name, scalar(1.0), scalar(low), scalar(high))


def dequantize(emitter: Emitter, node: fx.Node) -> Value:
    """Emit integers to float: value * scale + bias."""
    layer, value = layer_of(node), emitter.value(node.args[0])
    if not isinstance(value, (Codes, Real)):
        raise LoweringError(f"layer {layer!r}: dequantize reads {node.args[0]}, which holds no integers")
    real = emitter.integers(value)
    scale, bias = (emitter.constant(one).astype(np.float64) for one in node.args[1:3])
    name = emitter.scaled(real, np.asarray(scale / real.factor), layer, "scale")
    if (bias != 0.0).any():
        added = emitter.builder.initializer(f"{layer}/bias", bias, np.float32)
        name = emitter.builder.node("Add", [name, added], node.name, f"{layer}/add_bias")
    return Plain(name)
