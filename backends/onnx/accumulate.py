"""Quantised layers: `accumulate_conv` and `accumulate_linear`.

Where one requantisation to codes reads the accumulators, both are emitted together in the form that runtimes
execute in 8-bit integers (see `fused`). Otherwise the accumulators themselves are needed: a float convolution
of integer values, exact below 2^24. Its weights are stored as int8 and cast, which runtimes do at load time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from .emit import Deviation, Emitter, Probe, layer_of, zero_point_of
from .fused import ROUNDING, FusedLayer, Sums, conv_attributes, fuse, spread
from .values import Array, Codes, Deferred, Real, Value, channels, scalar


def accumulate(emitter: Emitter, node: fx.Node) -> Value:
    """Emit or defer one layer."""
    layer = layer_of(node)
    codes = emitter.codes(emitter.value(node.args[0]), layer=layer)
    weight = emitter.constant(node.args[1]).astype(np.int64) * 2 ** int(node.args[3]) + int(node.args[2])
    sums = Sums(weight, codes.low, codes.high)
    fused = {user: _fused(emitter, node, user, sums, codes) for user in node.users}
    layers = {user: one for user, one in fused.items() if one is not None}
    if len(layers) == len(fused):
        return Deferred(codes, layers)
    return _float_sums(emitter, node, sums, codes)


def _fused(emitter: Emitter, node: fx.Node, user: fx.Node, sums: Sums, codes: Codes) -> FusedLayer | None:
    if emitter.model.operator_name(user) != "requantize" or len(user.args[0]) != 1:
        return None
    low, high = int(user.args[4]), int(user.args[5])
    if high - low > 255:
        return None
    count = len(sums.weight)
    multiplier, constant = emitter.constant(user.args[1][0]), emitter.constant(user.args[2])
    if not (_per_channel(multiplier, node, emitter) and _per_channel(constant, node, emitter)):
        return None
    return fuse(
        sums,
        codes.high + codes.zero_point,
        spread(multiplier, count),
        spread(constant, count),
        int(user.args[3]),
        (low, high),
        (codes.unit, float(user.meta.get("unit", 1.0))),
        may_double=not _is_conv(node) or int(node.args[7]) == 1,
    )


def _is_conv(node: fx.Node) -> bool:
    return node.target._schema.name.endswith("conv")


def _per_channel(values: NDArray[Any], node: fx.Node, emitter: Emitter) -> bool:
    """Whether a constant of a requantisation is a scalar or varies along the layer's output channels."""
    rank = len(emitter.shape(node))
    trailing = rank - 2 if _is_conv(node) else 0
    return values.size == 1 or (values.ndim >= 1 and values.shape[values.ndim - 1 - trailing :][0] == values.size)


def _float_sums(emitter: Emitter, node: fx.Node, sums: Sums, codes: Codes) -> Real:
    layer, builder = layer_of(node), emitter.builder
    sign = _sign(emitter, node, len(sums.weight))
    weight = sums.weight * sign.reshape(-1, *([1] * (sums.weight.ndim - 1)))
    narrow = np.int8 if weight.min() >= -128 and weight.max() <= 127 else np.int16
    source = emitter.integers(codes).name
    rank = len(emitter.shape(node))
    if _is_conv(node):
        stored = builder.initializer(f"{layer}/weight", weight, narrow)
        cast = builder.node("Cast", [stored], f"{node.name}.weight", f"{layer}/weight_cast", to=1)
        attributes = conv_attributes(*node.args[4:8], weight.shape[2:])
        operator = f"{layer}/conv"
        name = builder.node("Conv", [source, cast], node.name, operator, **attributes)
        factor = channels(sign, rank, 1)
    else:
        stored = builder.initializer(f"{layer}/weight", weight.T, narrow)
        cast = builder.node("Cast", [stored], f"{node.name}.weight", f"{layer}/weight_cast", to=1)
        operator = f"{layer}/matmul"
        name = builder.node("MatMul", [source, cast], node.name, operator)
        factor = channels(sign, rank, rank - 1)
    emitter.lowered.probes[node.name] = Probe(
        operator, codes.name, codes.zero_point, sign, False, emitter.shape(node), _is_conv(node)
    )
    axis = 1 if _is_conv(node) else rank - 1
    low, high = (channels(bound, rank, axis) for bound in sums.bounds())
    factor = factor if (sign < 0).any() else scalar(1.0)
    return Real(name, factor, low, high, is_sum=True, rounding=_sum_rounding(sums, rank, axis))


def _sign(emitter: Emitter, node: fx.Node, count: int) -> NDArray[np.int64]:
    """-1 for channels that every reader multiplies by a negative number, so that clipping stays in place."""
    signs = []
    for user in node.users:
        if emitter.model.operator_name(user) != "requantize":
            return np.ones(count, np.int64)
        for one, multiplier in zip(user.args[0], user.args[1], strict=True):
            values = emitter.constant(multiplier)
            if one is node:
                if values.size not in (1, count):
                    return np.ones(count, np.int64)
                signs.append(np.sign(spread(values, count)))
    negative = np.all(np.stack(signs) < 0, axis=0)
    return np.where(negative, -1, 1).astype(np.int64)


def _sum_rounding(sums: Sums, rank: int, axis: int) -> Array:
    """Bound of what float32 rounds while the products are summed, in accumulator units.

    Integers below 2^24 are exact. Runtimes may start from the other summand of a residual sum and add blocks
    of at least 8 input channels or 128 products, each of which rounds once.
    """
    weight = sums.weight
    products = weight[0].size
    blocks = max(-(-weight.shape[1] // 8), -(-products // 128)) + 1
    reach = sums.reach().astype(np.float64)
    roundings = np.where(reach < 2**24, blocks, products)
    return channels(roundings * reach * ROUNDING, rank, axis)


def emit_fused(emitter: Emitter, node: fx.Node, user: fx.Node, value: Deferred, output: str) -> str:
    """Emit a layer together with the requantisation `user`; returns the uint8 tensor before clipping."""
    fused, codes, builder, layer = value.layers[user], value.codes, emitter.builder, layer_of(node)
    source = _doubled(emitter, codes, 1 if _is_conv(node) else -1) if fused.doubled else codes.name
    shape = emitter.shape(node)
    rows = not _is_conv(node) and len(shape) != 2  # Gemm takes matrices only
    if rows:
        source = _reshaped(emitter, source, (-1, fused.weight.shape[1]), layer, "rows")
    scale = builder.initializer(f"{layer}/input_scale", codes.unit, np.float32)
    zero = builder.initializer(f"{layer}/input_zero_point", codes.zero_point, np.uint8)
    real = builder.node(
        "DequantizeLinear", [source, scale, zero], f"{node.name}.input", f"{layer}/dequantize"
    )
    weight = _dequantized(emitter, f"{node.name}.weight", layer, "weight", fused.weight, fused.weight_scale)
    bias_scale = fused.weight_scale * np.float32(codes.unit)
    bias = _dequantized(emitter, f"{node.name}.bias", layer, "bias", fused.bias, bias_scale)
    if _is_conv(node):
        attributes = conv_attributes(*node.args[4:8], fused.weight.shape[2:])
        operator = f"{layer}/conv"
        sums = builder.node("Conv", [real, weight, bias], node.name, operator, **attributes)
    else:
        operator = f"{layer}/gemm"
        sums = builder.node("Gemm", [real, weight, bias], node.name, operator, transB=1)
    probe = Probe(operator, codes.name, codes.zero_point, fused.factor, fused.doubled, shape, _is_conv(node))
    emitter.lowered.probes.setdefault(node.name, probe)
    axis = 1 if _is_conv(node) else len(shape) - 1
    emitter.lowered.deviations[user.name] = Deviation(0.0, channels(fused.error, len(shape), axis))
    unit, low = float(user.meta.get("unit", 1.0)), int(user.args[4])
    stored = emitter.quantized(sums, unit, zero_point_of(low), output, layer_of(user))
    return _reshaped(emitter, stored, shape, layer_of(user), "shape") if rows else stored


def _doubled(emitter: Emitter, codes: Codes, axis: int) -> str:
    def concat() -> str:
        inputs, name = [codes.name, codes.name], f"{codes.name}.twice"
        layer = emitter.builder.layer(codes.name)
        return emitter.builder.node("Concat", inputs, name, f"{layer}/twice", axis=axis)

    return emitter.once(f"{codes.name}.twice", concat)


def _dequantized(
    emitter: Emitter, output: str, layer: str, what: str, values: NDArray[Any], scale: NDArray[np.float32]
) -> str:
    builder = emitter.builder
    inputs = [
        builder.initializer(f"{layer}/{what}", values),
        builder.initializer(f"{layer}/{what}_scale", scale),
        builder.initializer(f"{layer}/{what}_zero_point", np.zeros(scale.shape, values.dtype)),
    ]
    return builder.node("DequantizeLinear", inputs, output, f"{layer}/{what}_dequantize", axis=0)


def _reshaped(emitter: Emitter, source: str, shape: tuple[int, ...], layer: str, what: str) -> str:
    size = emitter.builder.initializer(f"{layer}/{what}", shape, np.int64)
    return emitter.builder.node("Reshape", [source, size], f"{source}.{what}", f"{layer}/{what}")
