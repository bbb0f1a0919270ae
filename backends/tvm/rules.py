"""How each operator of an integer graph becomes kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from qcompile.errors import LoweringError
from qcompile.passes.aten import arguments_of

from .kernel_graph import Builder, Mapped, Rule, extents, padding_of
from .kernels.elementwise import dequantize_kernel, pool_kernel, quantize_kernel, requantize_kernel
from .kernels.floats import float_conv_kernel, float_linear_kernel
from .maps import LANES, Map, round_up
from .packing import arrange, runs_of
from .specs import ACCUMULATOR, Layer, Output


def _layer(node: fx.Node) -> str:
    return str(node.meta.get("layer", node.name))


# ---- quantised layers -------------------------------------------------------------------------------------


def accumulate(builder: Builder, node: fx.Node) -> None:
    """A layer, with every requantisation that can be computed where its sums are."""
    is_conv = builder.model.operator_name(node) == "accumulate_conv"
    weight = builder.array(node.args[1]).astype(np.int64)
    numerator, shift = int(node.args[2]), int(node.args[3])
    stride, dilation, groups, padding = (1, 1), (1, 1), 1, (0, 0, 0, 0)
    if is_conv:
        if weight.ndim > 4:
            raise LoweringError(
                f"layer {_layer(node)!r}: convolutions over volumes have no kernel on this target"
            )
        stride, dilation = _pair(node.args[4]), _pair(node.args[6])
        groups, padding = int(node.args[7]), padding_of(node)
        weight = weight[:, :, None] if weight.ndim == 3 else weight
    else:
        weight = weight[:, :, None, None]
    source = builder.mapped(node.args[0], not is_conv, padding)
    fused = [user for user in node.users if _fuses(builder, node, user)]
    raw = builder.tapped or len(fused) < len(node.users)
    runs = runs_of(weight.shape, source.map.padded, dilation, groups)
    bits, signed = int(node.meta["weight_bits"]), bool(node.meta["weight_signed"])
    if groups > 1 and (numerator or shift):
        # between groups there must be zeros, which no code stands for
        weight, bits, signed, numerator, shift = weight * 2**shift + numerator, 8, True, 0, 0
        if weight.min() < -128 or weight.max() > 127:
            raise LoweringError(
                f"layer {_layer(node)!r}: grouped weights of more than 8 bits have no kernel here"
            )
    vectors = arrange(weight, runs, groups)
    _, h, w, _ = extents(builder.shape(node), not is_conv)
    layer = Layer(
        source.map,
        runs,
        stride,
        dilation,
        (padding[0], padding[2]),
        h,
        w,
        int(node.meta["code_high"]) + source.map.zero_point,
        bits,
        signed,
        numerator,
        shift,
        (),
        (),
    )
    family = builder.choose(layer)
    effective = vectors.astype(np.int64) * 2**shift + numerator
    correction = (source.map.zero_point - family.bias(layer)) * effective.sum((1, 3)).reshape(-1)
    outputs: list[Output] = []
    constants: list[fx.Node] = []
    others: list[Mapped] = []
    nodes: list[tuple[fx.Node, Map]] = []
    for user in fused:
        output, table, more = _output(builder, user, not is_conv, node, correction, len(others))
        others += more
        outputs.append(output)
        constants.append(builder.constant(f"{user.name}_constants", table))
        nodes.append((user, output.map))
    if raw:
        map = builder.map_of(node, not is_conv, "int32")
        outputs.append(Output(map, (ACCUMULATOR,), -(2**31), 2**31 - 1))
        table = np.zeros((2, map.padded))
        table[0, : len(correction)], table[1] = -correction[: map.padded], 1.0
        constants.append(builder.constant(f"{node.name}_sums", table))
        nodes.append((node, map))
    layer = replace(layer, outputs=tuple(outputs), others=tuple(one.map for one in others))
    name = f"{_layer(node)}_{family.name}_weights"
    packed = builder.constant(name, family.pack(vectors, layer))
    inputs = [source.node, packed, *(one.node for one in others), *constants]
    made = builder.kernel(
        _layer(node),
        f"{family.name} w{bits}a{layer.code_bits}",
        inputs,
        [(one.map.shape, one.map.dtype) for one in outputs],
        lambda name: family.build(name, layer),
    )
    for (owner, map), result in zip(nodes, made, strict=True):
        builder.set_map(owner, Mapped(result, map, not is_conv))


def _pair(values: Sequence[Any]) -> tuple[int, int]:
    given = [int(one) for one in values]
    return (1, given[0]) if len(given) == 1 else (given[0], given[1])


def _fuses(builder: Builder, node: fx.Node, user: fx.Node) -> bool:
    """Whether a requantisation can be computed where this layer's sums are: its other inputs come first."""
    if builder.model.operator_name(user) != "requantize":
        return False
    inputs = list(user.args[0])
    if inputs.count(node) != 1 or any(builder.shape(one) != builder.shape(user) for one in inputs):
        return False
    return builder.ensure([one for one in inputs if one is not node])


def _output(
    builder: Builder,
    node: fx.Node,
    rows: bool,
    layer: fx.Node | None,
    correction: NDArray[np.int64] | None,
    offset: int,
) -> tuple[Output, NDArray[np.float64], list[Mapped]]:
    """A requantisation: what it writes, its constants, the maps it reads besides the layer's sums."""
    inputs, multipliers, constant, shift, low, high = node.args
    dtype = builder.dtype(node)
    stored = "uint8" if dtype in ("uint8", "int8") else dtype
    zero_point = max(0, -int(low)) if stored == "uint8" else 0
    map = builder.map_of(node, rows, stored, zero_point)
    table = np.zeros((1 + len(inputs), map.padded))
    table[0, : map.channels] = _channels(builder, node, constant, rows, map.channels)
    terms: list[int] = []
    others: list[Mapped] = []
    for index, (one, multiplier) in enumerate(zip(inputs, multipliers, strict=True), start=1):
        factors = _channels(builder, node, multiplier, rows, map.channels)
        table[index, : map.channels] = factors
        if one is layer:
            terms.append(ACCUMULATOR)
            assert correction is not None
            table[0, : map.channels] -= factors * correction[: map.channels]
            continue
        other = builder.mapped(one, rows)
        terms.append(offset + len(others))
        others.append(other)
        table[0, : map.channels] -= factors * other.map.zero_point
    return Output(map, tuple(terms), int(low), int(high)), table * 2.0 ** -int(shift), others


def _channels(
    builder: Builder, node: fx.Node, constant: fx.Node, rows: bool, count: int
) -> NDArray[np.float64]:
    """A scalar or per-channel constant as (channels,) float64."""
    array = builder.array(constant).astype(np.float64)
    if array.size == 1:
        return np.full(count, float(array.reshape(())))
    rank = len(builder.shape(node))
    axis = rank - 1 if rows or rank == 2 else 1
    shape = (1,) * (rank - array.ndim) + array.shape
    if shape[axis] != array.size or array.size != count:
        raise LoweringError(
            f"layer {_layer(node)!r}: its constants vary along another dimension than the channels"
        )
    return array.reshape(-1)


def requantize(builder: Builder, node: fx.Node) -> None:
    """An epilogue of its own."""
    rows = _channels_last(builder, node)
    for one in node.args[0]:
        if builder.shape(one) != builder.shape(node):
            raise LoweringError(
                f"layer {_layer(node)!r}: sums of tensors of different shapes have no kernel here"
            )
    output, table, others = _output(builder, node, rows, None, None, 0)
    maps = tuple(one.map for one in others)
    constants = builder.constant(f"{node.name}_constants", table)
    (made,) = builder.kernel(
        _layer(node),
        "requantize",
        [*(one.node for one in others), constants],
        [(output.map.shape, output.map.dtype)],
        lambda name: requantize_kernel(name, output, maps),
    )
    builder.set_map(node, Mapped(made, output.map, rows))


def _channels_last(builder: Builder, node: fx.Node) -> bool:
    """Whether a requantisation's constants vary along the last dimension, not dimension 1."""
    rank = len(builder.shape(node))
    for constant in (*node.args[1], node.args[2]):
        array = builder.array(constant)
        if array.size > 1:
            return array.shape[-1] == array.size
    known = [builder.maps[one].rows for one in node.args[0] if one in builder.maps]
    return rank == 2 or (known[0] if known else rank != 4)


def _reads_rows(builder: Builder, node: fx.Node) -> bool:
    """Whether the readers of a tensor want its channels in the last dimension."""
    if len(builder.shape(node)) == 2:
        return True
    kinds = {builder.model.operator_name(user) for user in node.users}
    return "accumulate_linear" in kinds


def quantize(builder: Builder, node: fx.Node) -> None:
    """Codes, or wide integers, of a float tensor."""
    source, step, low, high = node.args
    have = builder.maps.get(source)
    rows = _reads_rows(builder, node)
    if have is not None:
        rows = have.rows
    given = builder.mapped(source, rows)
    dtype = builder.dtype(node)
    stored = "uint8" if dtype in ("uint8", "int8") else dtype
    map = builder.map_of(node, rows, stored, max(0, -int(low)) if stored == "uint8" else 0)
    (made,) = builder.kernel(
        _layer(node),
        "quantize",
        [given.node],
        [(map.shape, map.dtype)],
        lambda name: quantize_kernel(name, given.map, map, float(step), int(low), int(high)),
    )
    builder.set_map(node, Mapped(made, map, rows))


def dequantize(builder: Builder, node: fx.Node) -> None:
    """Floats of integers."""
    source, scale, bias = node.args
    have = builder.maps.get(source)
    rows = have.rows if have is not None else len(builder.shape(node)) != 4
    given = builder.mapped(source, rows)
    map = builder.map_of(node, rows, "float32")
    table = np.zeros((2, map.padded), np.float32)
    for index, one in enumerate((scale, bias)):
        table[index, : map.channels] = _channels(builder, node, one, rows, map.channels)
    constants = builder.constant(f"{node.name}_constants", table)
    (made,) = builder.kernel(
        _layer(node),
        "dequantize",
        [given.node, constants],
        [(map.shape, map.dtype)],
        lambda name: dequantize_kernel(name, given.map, map),
    )
    builder.set_map(node, Mapped(made, map, rows))


def pool(is_max: bool) -> Rule:
    """Maxima or sums over windows."""

    def rule(builder: Builder, node: fx.Node) -> None:
        kernel, stride, padding = (_pair(one) for one in node.args[1:4])
        if len(node.args[1]) == 1:
            padding = (0, padding[1])
        _pool(builder, node, kernel, stride, padding, _pair(node.args[4]) if is_max else (1, 1), is_max)

    return rule


def float_max_pool(builder: Builder, node: fx.Node) -> None:
    """Maxima of floats over windows of images; others are left to TVM."""
    if len(builder.shape(node)) != 4:
        other(builder, node)
        return
    given = arguments_of(node)
    kernel, padding, dilation = (_both(given[key]) for key in ("kernel_size", "padding", "dilation"))
    stride = _both(given["stride"]) if given["stride"] else kernel
    _pool(builder, node, kernel, stride, padding, dilation, True)


def _pool(
    builder: Builder,
    node: fx.Node,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    is_max: bool,
) -> None:
    if len(builder.shape(node)) > 4:
        raise LoweringError(f"layer {_layer(node)!r}: pooling of volumes has no kernel on this target")
    source = builder.mapped(node.args[0], False)
    dtype = source.map.dtype if is_max else "int64"
    map = builder.map_of(node, False, dtype, source.map.zero_point if is_max else 0)
    (made,) = builder.kernel(
        _layer(node),
        "max_pool" if is_max else "sum_pool",
        [source.node],
        [(map.shape, map.dtype)],
        lambda name: pool_kernel(name, source.map, map, kernel, stride, padding, dilation, is_max),
    )
    builder.set_map(node, Mapped(made, map, False))


# ---- float ------------------------------------------------------------------------------------------------


def float_conv(builder: Builder, node: fx.Node) -> None:
    """A float convolution without groups over an image; others are left to TVM."""
    given = arguments_of(node)
    weight = given["weight"]
    if weight.op != "get_attr" or int(given["groups"]) != 1 or isinstance(given["padding"], str):
        other(builder, node)
        return
    values, shape = builder.array(weight), builder.shape(given["input"])
    stride, dilation, pads = (_both(given[key]) for key in ("stride", "dilation", "padding"))
    chain = _tail(builder, node)
    last = chain[-1] if chain else node
    map = builder.map_of(last, False, "float32")
    packed = np.zeros((map.padded, *values.shape[1:]), np.float32)
    packed[: len(values)] = values
    packed = packed.reshape(map.padded // LANES, LANES, -1).transpose(0, 2, 1)
    given_constants = [one.args[1] for one in chain if len(one.args) == 2]
    constants = np.zeros((1 + len(given_constants), map.padded), np.float32)
    if given["bias"] is not None:
        constants[0, : len(values)] = builder.array(given["bias"])
    for row, one in enumerate(given_constants, start=1):
        constants[row, : len(values)] = _channels(builder, node, one, False, len(values))
    is_rectified = bool(chain) and builder.model.operator_name(last) == "aten.relu"
    kernel, padding = (int(values.shape[2]), int(values.shape[3])), (pads[0], pads[0], pads[1], pads[1])
    (made,) = builder.kernel(
        _layer(node),
        "float_conv",
        [
            builder.plain(given["input"]),
            builder.constant(f"{_layer(node)}_weights", np.ascontiguousarray(packed)),
            builder.constant(f"{_layer(node)}_constants", constants),
        ],
        [(map.shape, "float32")],
        lambda name: float_conv_kernel(
            name, shape, kernel, stride, padding, dilation, map, len(constants) == 3, is_rectified
        ),
    )
    for one in (node, *chain[:-1]):
        builder.absorb(one)
    builder.set_map(last, Mapped(made, map, False))


def _tail(builder: Builder, node: fx.Node) -> list[fx.Node]:
    """What a float convolution's kernel computes behind it: a factor and a summand per channel, a ReLU."""
    chain: list[fx.Node] = []
    for names in (("aten.mul", "aten.add"), ("aten.relu",)):
        found, last = [], chain[-1] if chain else node
        for name in names:
            reader = next(iter(last.users)) if len(last.users) == 1 else None
            if reader is None or builder.model.operator_name(reader) != name or reader.args[0] is not last:
                break
            if len(reader.args) > 1 and not _is_per_channel(builder, node, reader.args[1]):
                break
            found.append(reader)
            last = reader
        else:
            chain += found
    return chain


def _is_per_channel(builder: Builder, node: fx.Node, value: Any) -> bool:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return False
    try:
        _channels(builder, node, value, False, builder.shape(node)[1])
    except LoweringError:
        return False
    return True


def _both(value: Any) -> tuple[int, int]:
    given = [int(one) for one in (value if isinstance(value, (list, tuple)) else [value])]
    return (given[0], given[-1])


def float_linear(builder: Builder, node: fx.Node) -> None:
    """A float linear layer on rows; others are left to TVM."""
    given = arguments_of(node)
    if given["weight"].op != "get_attr" or len(builder.shape(given["input"])) != 2:
        other(builder, node)
        return
    values = builder.array(given["weight"])
    outputs, inputs = values.shape
    padded = round_up(outputs, LANES)
    packed = np.zeros((padded, inputs), np.float32)
    packed[:outputs] = values
    packed = np.ascontiguousarray(packed.reshape(-1, LANES, inputs).transpose(0, 2, 1))
    bias = np.zeros(padded, np.float32)
    if given["bias"] is not None:
        bias[:outputs] = builder.array(given["bias"])
    rows = builder.shape(node)[0]
    (made,) = builder.kernel(
        _layer(node),
        "float_linear",
        [
            builder.plain(given["input"]),
            builder.constant(f"{_layer(node)}_weights", packed),
            builder.constant(f"{_layer(node)}_bias", bias),
        ],
        [((rows, outputs), "float32")],
        lambda name: float_linear_kernel(name, rows, inputs, outputs, padded),
    )
    builder.set_plain(node, made)


def elementwise(builder: Builder, node: fx.Node) -> None:
    """A float operator element by element stays in the layout of its input."""
    inputs = [one for one in node.all_input_nodes if one.op != "get_attr"]
    known = [builder.maps.get(one) for one in inputs]
    first = known[0] if known else None
    same = first is not None and all(one is not None and one.map == first.map for one in known)
    constants = [one for one in node.all_input_nodes if one.op == "get_attr"]
    if not same or first is None or builder.shape(node) != builder.shape(inputs[0]):
        other(builder, node)
        return
    try:
        tables = {one: _channels(builder, node, one, first.rows, first.map.channels) for one in constants}
    except LoweringError:
        other(builder, node)
        return
    placed: dict[fx.Node, fx.Node] = {}
    for one in constants:
        table = np.ones(first.map.padded, np.float32)  # the channels that pad divide by it too
        table[: first.map.channels] = tables[one]
        placed[one] = builder.constant(f"{one.target}_by_channel", table)
    for one in inputs:
        placed[one] = builder.maps[one].node
    builder.set_map(node, Mapped(builder.graph.node_copy(node, placed.__getitem__), first.map, first.rows))


def other(builder: Builder, node: fx.Node) -> None:
    """Anything else, on tensors as torch sees them, legalised and fused by TVM."""
    builder.set_plain(node, builder.graph.node_copy(node, builder.plain))


#: Float operators that work element by element.
_ELEMENTWISE = (
    "relu",
    "relu6",
    "hardtanh",
    "clamp",
    "add",
    "sub",
    "mul",
    "div",
    "silu",
    "sigmoid",
    "tanh",
) + (*("exp", "hardswish", "hardsigmoid", "leaky_relu", "elu", "gelu", "neg", "abs", "sqrt"),)

RULES: dict[str, Rule] = {
    "accumulate_conv": accumulate,
    "accumulate_linear": accumulate,
    "requantize": requantize,
    "quantize": quantize,
    "dequantize": dequantize,
    "max_pool": pool(True),
    "sum_pool": pool(False),
    "aten.conv2d": float_conv,
    "aten.linear": float_linear,
    "aten.max_pool2d": float_max_pool,
    **{f"aten.{name}": elementwise for name in _ELEMENTWISE},
    "": other,
}
