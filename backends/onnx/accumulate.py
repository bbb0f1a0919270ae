"""Quantised layers: `accumulate_conv` and `accumulate_linear`.

Where requantisations to codes read the accumulators and nothing else, both are emitted together in the form
that runtimes execute in 8-bit integers (see `fused`). Otherwise the accumulators themselves are needed: a
matrix product of integers (see `matrix`), or for grouped convolutions a float convolution of integer values,
exact below 2^24.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from qcompile.errors import LoweringError

from .emit import Deviation, Emitter, Probe, layer_of
from .forms import as_codes, as_real, channels_first, quantized, reshaped, zero_point_of
from .fused import FusedLayer, Sums, conv_attributes, fuse, spread
from .matrix import fits_matrix, integer_matrix, is_conv
from .values import Codes, Deferred, Real, Value, channels, scalar
from .weights import stored_weight


def accumulate(emitter: Emitter, node: fx.Node) -> Value:
    """Emit or defer one layer."""
    layer = layer_of(node)
    codes = as_codes(emitter, emitter.value(node.args[0]), layer=layer)
    weight = emitter.constant(node.args[1]).astype(np.int64) * 2 ** int(node.args[3]) + int(node.args[2])
    sums = Sums(weight, codes.low, codes.high)
    fused = {user: _fused(emitter, node, user, sums, codes) for user in node.users}
    layers = {user: one for user, one in fused.items() if one is not None}
    if len(layers) == len(fused):
        return Deferred(codes, layers)
    if fits_matrix(emitter, node, sums):
        return integer_matrix(emitter, node, sums, codes)
    if not is_conv(node):
        raise LoweringError(f"layer {layer!r}: its weights or sums do not fit ONNX's integer matrix product")
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
        may_repeat=not is_conv(node) or int(node.args[7]) == 1,
    )


def _attributes(node: fx.Node, weight: tuple[int, ...]) -> dict[str, Any]:
    stride, padding, dilation, groups = node.args[4:8]
    return conv_attributes(stride, padding, dilation, groups, weight[2:])


def _per_channel(values: NDArray[Any], node: fx.Node, emitter: Emitter) -> bool:
    """Whether a constant of a requantisation is a scalar or varies along the layer's output channels."""
    rank = len(emitter.shape(node))
    trailing = rank - 2 if is_conv(node) else 0
    return values.size == 1 or (
        values.ndim >= 1 and values.shape[values.ndim - 1 - trailing :][0] == values.size
    )


def _float_sums(emitter: Emitter, node: fx.Node, sums: Sums, codes: Codes) -> Real:
    """A convolution of integer values in float32; weights are stored as integers and cast at load time."""
    layer, builder, weight = layer_of(node), emitter.builder, sums.weight
    if weight.min() >= -128 and weight.max() <= 127:
        stored = stored_weight(emitter, layer, "weight", weight, emitter.constant(node.args[1]), axis=0)
    else:
        stored = builder.initializer(f"{layer}/weight", weight, np.int16)
    cast = builder.node("Cast", [stored], f"{node.name}.weight", f"{layer}/weight_cast", to=1)
    inputs, operator = [channels_first(emitter, as_real(emitter, codes)).name, cast], f"{layer}/conv"
    attributes = _attributes(node, weight.shape)
    name = builder.node("Conv", inputs, node.name, operator, **attributes)
    shape, factor = emitter.shape(node), np.ones(len(weight), np.int64)
    emitter.lowered.probes[node.name] = Probe(operator, codes, factor, 1, shape, True)
    reach = sums.reach().astype(np.float64)
    low, high, reach = (channels(one, len(shape), 1) for one in (*sums.bounds(), reach))
    return Real(name, shape, scalar(1.0), low, high, is_sum=True, taps=weight[0].size, reach=reach)


def emit_fused(emitter: Emitter, node: fx.Node, user: fx.Node, value: Deferred, output: str) -> str:
    """Emit a layer together with the requantisation `user`; returns the uint8 tensor before clipping."""
    fused, codes, builder, layer = value.layers[user], value.codes, emitter.builder, layer_of(node)
    codes = channels_first(emitter, codes)
    source = _repeated(emitter, codes, fused.parts, 1 if is_conv(node) else -1)
    shape = emitter.shape(node)
    rows = not is_conv(node) and len(shape) != 2  # Gemm takes matrices only
    if rows:
        source = reshaped(emitter, source, (-1, fused.weight.shape[1]), f"{node.name}.rows", layer)
    scale = builder.initializer(f"{layer}/input_scale", codes.unit, np.float32)
    zero = builder.initializer(f"{layer}/input_zero_point", codes.zero_point, np.uint8)
    real = builder.node(
        "DequantizeLinear", [source, scale, zero], f"{node.name}.input", f"{layer}/dequantize"
    )
    weight_codes = np.concatenate([emitter.constant(node.args[1])] * fused.parts, axis=1)
    stored = stored_weight(emitter, layer, "weight", fused.weight, weight_codes, axis=0)
    weight = _dequantized(
        emitter, f"{node.name}.weight", layer, "weight", stored, np.int8, fused.weight_scale
    )
    bias_scale = fused.weight_scale * np.float32(codes.unit)
    stored = builder.initializer(f"{layer}/bias", fused.bias)
    bias = _dequantized(emitter, f"{node.name}.bias", layer, "bias", stored, np.int32, bias_scale)
    if is_conv(node):
        attributes = _attributes(node, fused.weight.shape)
        operator = f"{layer}/conv"
        sums = builder.node("Conv", [real, weight, bias], node.name, operator, **attributes)
    else:
        operator = f"{layer}/gemm"
        sums = builder.node("Gemm", [real, weight, bias], node.name, operator, transB=1)
    probe = Probe(operator, value.codes, fused.factor, fused.parts, shape, is_conv(node))
    emitter.lowered.probes.setdefault(node.name, probe)
    axis = 1 if is_conv(node) else len(shape) - 1
    emitter.lowered.deviations[user.name] = Deviation(0.0, channels(fused.error, len(shape), axis))
    unit, low = float(user.meta.get("unit", 1.0)), int(user.args[4])
    output_codes = quantized(emitter, sums, unit, zero_point_of(low), output, layer_of(user))
    if not rows:
        return output_codes
    return reshaped(emitter, output_codes, shape, f"{output}.shaped", layer_of(user))


def _repeated(emitter: Emitter, codes: Codes, times: int, axis: int) -> str:
    name = f"{codes.name}.times_{times}"

    def concat() -> str:
        layer = emitter.builder.layer(codes.name)
        return emitter.builder.node("Concat", [codes.name] * times, name, f"{layer}/repeat", axis=axis)

    return codes.name if times == 1 else emitter.once(name, concat)


def _dequantized(
    emitter: Emitter, output: str, layer: str, what: str, stored: str, dtype: Any, scale: NDArray[np.float32]
) -> str:
    builder = emitter.builder
    inputs = [
        stored,
        builder.initializer(f"{layer}/{what}_scale", scale),
        builder.initializer(f"{layer}/{what}_zero_point", np.zeros(scale.shape, dtype)),
    ]
    return builder.node("DequantizeLinear", inputs, output, f"{layer}/{what}_dequantize", axis=0)
