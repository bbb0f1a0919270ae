"""How calls of modules become integers: quantisers, layers, batch normalisation, PReLU."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from qcompile.errors import FoldError

from .aten import arguments_of, is_zero_pad
from .batchnorm import ModeBatchNorm
from .bent import Bent, integer_thresholds
from .convert_emit import Emitter, Value, folded_dtype
from .eval_identities import IDENTITIES_IN_EVAL
from .float_layers import float_call, layer_call
from .fold import Affine, Term, broadcastable, integer_epilogue, staircase_epilogue, wide_epilogue
from .layers import QuantizedLayer
from .mode_input import MODE_INPUT, ModeModule
from .quantized_tensor import QuantizedTensor
from .quantizers import ActivationGrid, ActivationQuantizer, FloatRange, ThresholdGrid, WeightCodes
from .rprelu import ModePReLU
from .threshold_op import ALWAYS, NEVER

_OPS = torch.ops.qcompile
_ATEN = torch.ops.aten

#: Significant bits of float32.
FLOAT32_BITS = 24


def convert_module(emitter: Emitter, node: fx.Node, module: nn.Module, values: dict[fx.Node, Value]) -> Value:
    """Convert one module call."""
    inputs = [values[one] for one in node.args if isinstance(one, fx.Node) and not one.meta.get(MODE_INPUT)]
    if isinstance(module, ActivationQuantizer):
        return _quantize(emitter, node, module, inputs[0])
    if isinstance(module, QuantizedLayer):
        return _accumulate(emitter, node, module, inputs[0])
    if isinstance(module, QuantizedTensor):
        return _rounded_tensor(emitter, str(node.target), module)
    if isinstance(module, ModeBatchNorm):
        return _normalise(emitter, node, module, inputs[0])
    if isinstance(module, ModePReLU):
        return _bend(emitter, node, module, inputs[0])
    if isinstance(module, IDENTITIES_IN_EVAL):
        return inputs[0]
    return _float_module(emitter, node, module, inputs)


# ---- quantisers -------------------------------------------------------------------------------------------


def _quantize(emitter: Emitter, source: fx.Node, module: ActivationQuantizer, value: Value) -> Value:
    path = str(source.target)
    grid = module.grid(emitter.row_of(module))
    if isinstance(grid, FloatRange):
        return _clamped(emitter, path, grid, emitter.to_float(value))
    if isinstance(value, fx.Node) and isinstance(grid, ActivationGrid) and grid.spacing is None:
        arguments = (value, grid.scale, grid.low, grid.high)
        node = emitter.call(_OPS.quantize.default, arguments, path, layer=path, unit=grid.scale)
        return _codes(node, grid, len(emitter.shapes[source]), ())
    if isinstance(value, fx.Node):
        value = _as_fine_as_float(emitter, source, value, grid)
    if isinstance(grid, ThresholdGrid):
        return _count_thresholds(emitter, source, grid, value)
    if grid.spacing is not None:
        return emitter.epilogue(value, staircase_epilogue(value, grid), path)
    return emitter.epilogue(value, integer_epilogue(value, grid.scale, grid.low, grid.high), path)


def _codes(node: fx.Node, grid: ActivationGrid | ThresholdGrid, rank: int, layers: tuple[str, ...]) -> Affine:
    term = Term(node, np.float64(grid.scale), np.float64(grid.low), np.float64(grid.high))
    return Affine((term,), np.float64(0.0), rank, 1, layers=layers)


def _as_fine_as_float(
    emitter: Emitter, source: fx.Node, value: fx.Node, grid: ActivationGrid | ThresholdGrid
) -> Affine:
    """A float tensor as integers, as fine as float32 is over the quantiser's range.

    The unit is a power of two, so that ties stay where they are.
    """
    exponent = math.ceil(math.log2(max(abs(end) for end in grid.ends)))
    return emitter.rounded(source, value, 2.0 ** (exponent - FLOAT32_BITS), 2 ** (FLOAT32_BITS + 1))


def _count_thresholds(emitter: Emitter, source: fx.Node, grid: ThresholdGrid, value: Affine) -> Affine:
    path, rank = str(source.target), len(emitter.shapes[source])
    before = source.args[0]
    assert isinstance(before, fx.Node)
    # several summands have no order of their integers, so they are added up first
    summed = value if len(value.terms) == 1 else emitter.plain(value)
    chain: Affine | Bent = emitter.bent.get(before, summed)
    base = chain.base if isinstance(chain, Bent) else chain
    low, high = base.terms[0].bounds
    if low <= ALWAYS or high >= NEVER:  # sums over large areas
        base = emitter.epilogue(base, wide_epilogue(base), f"{path}.sum")
        chain = replace(chain, base=base) if isinstance(chain, Bent) else base
    sign, thresholds = integer_thresholds(chain, grid)
    levels = [broadcastable(one, rank, base.axis) for one in thresholds]
    arguments = (
        base.terms[0].node,
        emitter.constant(f"{path}.sign", broadcastable(sign, rank, base.axis), torch.int8),
        emitter.constant(f"{path}.thresholds", np.stack(levels), torch.int32),
        grid.low,
    )
    node = emitter.call(
        _OPS.threshold.default, arguments, path, layer=path, layers=list(base.layers), unit=grid.scale
    )
    return _codes(node, grid, rank, base.layers)


def _clamped(emitter: Emitter, path: str, bounds: FloatRange, value: fx.Node) -> fx.Node:
    """An activation quantiser in a float mode."""
    low, high = (None if math.isinf(one) else one for one in (bounds.low, bounds.high))
    if low is None and high is None:
        return value
    return emitter.call(_ATEN.clamp.default, (value, low, high), path, layer=path)


# ---- layers -----------------------------------------------------------------------------------------------


def _accumulate(emitter: Emitter, node: fx.Node, module: QuantizedLayer, value: Value) -> Value:
    path, geometry = str(node.target), module.geometry
    weight = module.weight_quantizer.codes(module.weight, emitter.row_of(module))
    if isinstance(weight, Tensor):
        return _float_layer(emitter, path, module, weight, emitter.to_float(value))
    if isinstance(value, fx.Node):
        return _weight_only_layer(emitter, path, module, weight, value)
    if not value.is_plain:
        raise FoldError(f"layer {path!r}: its input is not quantised")
    channels = len(weight.codes)
    if tuple(weight.scale.shape) not in ((), (1,), (channels,)):
        raise FoldError(
            f"layer {path!r}: scales of weight codes have shape {tuple(weight.scale.shape)}; () or "
            f"({channels},) was expected"
        )
    term = value.terms[0]
    low, high, bound = _accumulator_bounds(weight, int(term.low), int(term.high), path)
    codes = emitter.constant(f"{path}.weight_codes", weight.codes, torch.int8)
    offset = (weight.offset_numerator, weight.offset_shift)
    target: Any = _OPS.accumulate_linear.default
    arguments: tuple[Any, ...] = (term.node, codes, *offset, bound)
    if weight.multipliers is not None:
        target = _OPS.accumulate_groups.default
        multipliers = emitter.constant(f"{path}.weight_multipliers", weight.multipliers, torch.uint8)
        arguments = (term.node, codes, *offset, multipliers, bound)
    if geometry.kind == "conv":
        target = _OPS.accumulate_conv.default
        source, padding = _padding(term.node, geometry.flat_padding)
        moves = (list(geometry.stride), padding, list(geometry.dilation), geometry.groups)
        arguments = (source, codes, *offset, *moves, bound)
    sums = emitter.call(
        target,
        arguments,
        f"{path}.accumulate",
        layer=path,
        weight_bits=weight.bits,
        weight_signed=weight.signed,
        code_low=int(term.low),
        code_high=int(term.high),
    )
    scale = weight.scale.double().cpu().numpy() * float(term.coefficient) * 2.0**-weight.offset_shift
    rank = len(emitter.shapes[node])
    axis = 1 if geometry.kind == "conv" else rank - 1
    bias = np.float64(0.0) if module.bias is None else module.bias.detach().double().cpu().numpy()
    accumulator = Term(sums, np.asarray(scale, np.float64), low, high)
    return Affine((accumulator,), np.asarray(bias, np.float64), rank, axis, layers=(path,))


def _padding(codes: fx.Node, own: list[int]) -> tuple[fx.Node, list[int]]:
    """What a convolution reads, and its padding: operators that pad codes with 0 on their own join it."""
    padding = list(own)
    while codes.op == "call_function" and is_zero_pad(codes):
        amounts = [int(one) for one in arguments_of(codes)["pad"]]
        if len(amounts) > len(padding) or min(amounts, default=0) < 0:
            break
        # amounts go from the last dimension to the first, the convolution's from the first to the last
        last_first = zip(amounts[::2], amounts[1::2], strict=True)
        for dimension, (before, after) in enumerate(last_first, start=1):
            padding[-2 * dimension] += before
            padding[-2 * dimension + 1] += after
        codes = codes.args[0]
    return codes, padding


def _accumulator_bounds(
    weight: WeightCodes, low: int, high: int, path: str
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], int]:
    """Exact bounds of each output channel's accumulator, and of sums of products without the offset."""
    low, high = min(low, 0), max(high, 0)  # the border holds code 0
    found = []
    for index, channel in enumerate(weight.codes.flatten(1).cpu()):  # float64 of all is many times the codes
        codes = channel.double().numpy()
        effective = codes * 2.0**weight.offset_shift + weight.offset_numerator
        if weight.multipliers is not None:
            times = weight.multipliers[index].cpu().double().numpy()
            codes = effective = (effective.reshape(len(times), -1) * times[:, None]).reshape(-1)
        above, below = np.maximum(effective, 0).sum(), np.minimum(effective, 0).sum()
        found.append((above * low + below * high, above * high + below * low, np.abs(codes).sum()))
    smallest, largest, magnitudes = (np.array(one) for one in zip(*found, strict=True))
    if max(float(largest.max()), -float(smallest.min())) >= 2**31:
        raise FoldError(
            f"layer {path!r}: accumulators exceed 32 bits; pass skip=[{path!r}] to leave it in float"
        )
    bound = int(magnitudes.max()) * max(high, -low)
    return smallest, largest, bound


def _weight_only_layer(
    emitter: Emitter, path: str, module: QuantizedLayer, weight: WeightCodes, x: fx.Node
) -> fx.Node:
    """A layer in float whose weight is stored as codes."""
    real = _real_weight(emitter, path, weight)
    bias = None if module.bias is None else emitter.constant(f"{path}.bias", module.bias, torch.float32)
    made = layer_call(module.geometry, x, real, bias)
    return emitter.call(made.target, made.args, path, layer=path)


def _rounded_tensor(emitter: Emitter, path: str, module: QuantizedTensor) -> fx.Node:
    """Parameters of an operator in float."""
    weight = module.weight_quantizer.codes(module.weight, emitter.row_of(module))
    if isinstance(weight, Tensor):
        return emitter.constant(f"{path}.weight", weight, torch.float32)
    return _real_weight(emitter, path, weight)


def _real_weight(emitter: Emitter, path: str, weight: WeightCodes) -> fx.Node:
    """The float tensor that codes stand for."""
    scale = np.asarray(weight.scale.double().cpu().numpy())
    if weight.multipliers is not None:
        scale = scale[:, None] * weight.multipliers.double().cpu().numpy()
    offset = scale * weight.offset_numerator * 2.0**-weight.offset_shift
    if weight.centre is not None:
        offset = offset + np.asarray(weight.centre.double().cpu().numpy())
    codes = weight.codes
    if scale.ndim == 2:  # steps of groups
        codes = codes.reshape(*scale.shape, -1)
        scale, offset = scale[..., None], offset[..., None]
    rank = codes.dim()
    arguments = (
        emitter.constant(f"{path}.weight_codes", codes, torch.int8),
        emitter.constant(f"{path}.weight_scale", _leading(scale, rank), torch.float32),
        emitter.constant(f"{path}.weight_offset", _leading(offset, rank), torch.float32),
    )
    real = emitter.call(
        _OPS.dequantize.default,
        arguments,
        f"{path}.weight",
        layer=path,
        weight_bits=weight.bits,
        weight_signed=weight.signed,
    )
    if codes.shape != weight.codes.shape:
        shape = list(weight.codes.shape)
        real = emitter.call(_ATEN.reshape.default, (real, shape), f"{path}.weight_of_groups", layer=path)
    return real


def _leading(values: Any, rank: int) -> Any:
    """Values of the first dimensions, shaped to broadcast against a tensor of `rank` dimensions."""
    return values if values.ndim == 0 else values.reshape(*values.shape, *[1] * (rank - values.ndim))


def _float_layer(emitter: Emitter, path: str, module: QuantizedLayer, weight: Tensor, x: fx.Node) -> fx.Node:
    """A quantised layer in a float mode."""
    bias = None if module.bias is None else emitter.constant(f"{path}.bias", module.bias, torch.float32)
    made = layer_call(module.geometry, x, emitter.constant(f"{path}.weight", weight, torch.float32), bias)
    return emitter.call(made.target, made.args, path, layer=path)


def _float_module(emitter: Emitter, node: fx.Node, module: nn.Module, inputs: list[Value]) -> fx.Node:
    """A layer that stays in float, as the aten call that its module makes."""
    name = str(node.target)

    def constant(part: str, tensor: Tensor) -> fx.Node:
        return emitter.constant(f"{name}.{part}", tensor, folded_dtype(tensor))

    sources = [emitter.to_float(value) for value in inputs]
    row = emitter.row_of(module) if isinstance(module, ModeModule) else 0
    made = float_call(module, sources, constant, row, name)
    node_of_layer = emitter.call(made.target, made.args, name, layer=name)
    node_of_layer.kwargs = made.kwargs
    return node_of_layer


# ---- between layers ---------------------------------------------------------------------------------------


def _normalise(emitter: Emitter, node: fx.Node, module: ModeBatchNorm, value: Value) -> Value:
    maps = module.scale_and_shift(emitter.row_of(module), emitter.statistics)
    if maps is None:
        return _float_module(emitter, node, module, [value])
    scale, shift = (one.cpu().numpy() for one in maps)
    if isinstance(value, Affine):
        return _on_channels(emitter, value).scaled(scale, shift)
    rank, name = len(emitter.shapes[node]), str(node.target)
    factors = emitter.constant(f"{name}.scale", broadcastable(scale, rank, 1), torch.float32)
    shifts = emitter.constant(f"{name}.shift", broadcastable(shift, rank, 1), torch.float32)
    product = emitter.call(_ATEN.mul.Tensor, (value, factors), f"{name}.scaled", layer=name)
    return emitter.call(_ATEN.add.Tensor, (product, shifts), name, layer=name)


def _on_channels(emitter: Emitter, value: Affine) -> Affine:
    """The tensor ready for factors along dimension 1."""
    value = emitter.unclipped(value)
    if value.axis != 1 and not value.is_plain:
        value = emitter.plain(value)
    return replace(value, axis=1)


def _bend(emitter: Emitter, node: fx.Node, module: ModePReLU, value: Value) -> Value:
    """PReLU as its positive part plus slope times its negative part."""
    row, name = emitter.row_of(module), str(node.target)
    shift_in, slope, shift_out = (
        one[row].detach().double().cpu().numpy() for one in (module.shift_in, module.slope, module.shift_out)
    )
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if isinstance(value, fx.Node):
        fixed = emitter.fixed_point(source, value)
        if fixed is None:
            return _float_prelu(emitter, node, value, (shift_in, slope, shift_out), name)
        value = fixed
    base = _on_channels(emitter, value)
    if len(base.terms) > 1:
        base = replace(emitter.plain(base), axis=1)
    base = base.scaled(np.float64(1.0), -shift_in)
    if (slope >= 0).all():
        emitter.bent[node] = Bent(base, slope, shift_out)
    bent = emitter.plain(base.clipped(0.0, math.inf))
    if slope.any():
        negative = emitter.plain(base.clipped(-math.inf, 0.0))
        bent = bent.plus(replace(negative, axis=1).scaled(slope, np.float64(0.0)))
    return replace(bent, axis=1).scaled(np.float64(1.0), shift_out)


def _float_prelu(
    emitter: Emitter, node: fx.Node, value: fx.Node, numbers: tuple[Any, Any, Any], name: str
) -> fx.Node:
    rank = len(emitter.shapes[node])
    shapes = (rank, 1, rank)
    shift_in, slope, shift_out = (
        emitter.constant(f"{name}.{part}", broadcastable(one, size, 1) if size > 1 else one, torch.float32)
        for part, one, size in zip(("shift_in", "slope", "shift_out"), numbers, shapes, strict=True)
    )
    moved = emitter.call(_ATEN.sub.Tensor, (value, shift_in), f"{name}.moved", layer=name)
    bent = emitter.call(_ATEN.prelu.default, (moved, slope), f"{name}.bent", layer=name)
    return emitter.call(_ATEN.add.Tensor, (bent, shift_out), name, layer=name)
