"""How aten operators act on affine maps of integers.

Each rule takes (emitter, node, values) and returns the converted value, or None where the operator has no
integer form for these arguments and becomes a float island.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import fx

from .aten import LAYOUT, PRODUCTS, arguments_of, is_zero_pad
from .convert_emit import Emitter, Value
from .fold import Affine, Term, stream_epilogue

Rule = Callable[[Emitter, fx.Node, "dict[fx.Node, Value]"], "Value | None"]

_OPS, _ATEN = torch.ops.qcompile, torch.ops.aten
#: Joined tensors may have units that differ by this many bits.
UNIT_SPREAD_BITS = 8

_MULTI_OUTPUT = frozenset(("chunk", "split", "split_with_sizes", "unbind"))


def _input(node: fx.Node, values: dict[fx.Node, Value]) -> Affine:
    value = values[node.all_input_nodes[0]]
    assert isinstance(value, Affine)
    return value


def _clip(low: float | None, high: float | None) -> Rule:
    def rule(emitter: Emitter, node: fx.Node, values: dict[fx.Node, Value]) -> Value | None:
        bottom, top = low, high
        if bottom is None and top is None:
            given = arguments_of(node)
            bottom, top = given.get("min_val", given.get("min")), given.get("max_val", given.get("max"))
        if isinstance(bottom, fx.Node) or isinstance(top, fx.Node):
            return None
        below = -math.inf if bottom is None else float(bottom)
        above = math.inf if top is None else float(top)
        return _input(node, values).clipped(below, above)

    return rule


def _add(sign: float) -> Rule:
    def rule(emitter: Emitter, node: fx.Node, values: dict[fx.Node, Value]) -> Value | None:
        given = arguments_of(node)
        left, right = given["self"], given["other"]
        factor = sign * float(given.get("alpha") or 1)
        if not isinstance(right, fx.Node):
            return emitter.unclipped(_input(node, values)).scaled(np.float64(1.0), np.float64(factor * right))
        a, b = _as_integers(emitter, left, values), _as_integers(emitter, right, values)
        if a is None or b is None:
            return None
        if emitter.shapes[left] != emitter.shapes[right]:
            if a.rank != b.rank:
                return None
            a, b = emitter.plain(a), emitter.plain(b)
        a, b = emitter.unclipped(a), emitter.unclipped(b)
        if _channelled(a) and _channelled(b) and a.axis != b.axis:
            b = emitter.plain(b)
        return emitter.bounded(node, a.plus(b, factor))

    return rule


def _as_integers(emitter: Emitter, node: fx.Node, values: dict[fx.Node, Value]) -> Affine | None:
    """A summand or part as integers; a float one joins with high precision if a quantiser reads on."""
    value = values[node]
    return value if isinstance(value, Affine) else emitter.fixed_point(node, value)


def _channelled(value: Affine) -> bool:
    return value.constant.ndim > 0 or any(term.coefficient.ndim > 0 for term in value.terms)


def _scale(emitter: Emitter, node: fx.Node, values: dict[fx.Node, Value]) -> Value | None:
    given = arguments_of(node)
    other = given["other"]
    if isinstance(other, fx.Node) or not isinstance(given["self"], fx.Node):
        return None
    if str(node.target).startswith("aten.div") and (given.get("rounding_mode") or not other):
        return None
    factor = 1.0 / float(other) if str(node.target).startswith("aten.div") else float(other)
    return emitter.unclipped(_input(node, values)).scaled(np.float64(factor), np.float64(0.0))


def _move(emitter: Emitter, node: fx.Node, values: dict[fx.Node, Value]) -> Value | None:
    if (
        node.target._schema.name == "aten::pad"
        and not is_zero_pad(node)
        and arguments_of(node)["mode"] == "constant"
    ):
        return None
    if not isinstance(node.args[0], fx.Node) or not isinstance(values[node.args[0]], Affine):
        return None
    plain = emitter.plain(_input(node, values))
    source = node.args[0]

    def convert(one: fx.Node) -> fx.Node:
        if one is source:
            return plain.terms[0].node
        value = values[one]
        return value.terms[0].node if isinstance(value, Affine) else value

    copied = emitter.graph.node_copy(node, convert)
    copied.meta = {"layer": node.name}
    if node.target._schema.name.partition("::")[2] in _MULTI_OUTPUT:
        # a tuple: `getitem` picks from it, see RULES of convert
        return emitter.moved(plain, copied, rank=plain.rank)
    return emitter.moved(plain, copied, rank=len(emitter.shapes[node]))


def _upsample_nearest(emitter: Emitter, node: fx.Node, values: dict[fx.Node, Value]) -> Value | None:
    """By whole factors as repetitions, else as a selection: PyTorch has both for every integer type."""
    plain = emitter.plain(_input(node, values))
    moved = plain.terms[0].node
    factors = arguments_of(node).get("scale_factors") or ()
    source, target = (emitter.shapes[one][2:] for one in (node.all_input_nodes[0], node))
    for dim, (have, want) in enumerate(zip(source, target, strict=True), start=2):
        factor = [float(factors[dim - 2])] if factors else None
        line = torch.arange(have, dtype=torch.float64).reshape(1, 1, -1)
        picked = _ATEN.upsample_nearest1d.vec(line, None if factor else [want], factor).flatten().long()
        name = f"{node.name}_{dim}"
        if torch.equal(picked, torch.arange(want) * have // want) and want % have == 0:
            if want > have:
                arguments: tuple[Any, ...] = (moved, want // have, dim)
                moved = emitter.call(_ATEN.repeat_interleave.self_int, arguments, name, layer=node.name)
        else:
            index = emitter.constant(f"{name}.index", picked, torch.int64)
            moved = emitter.call(_ATEN.index_select.default, (moved, dim, index), name, layer=node.name)
    return emitter.moved(plain, moved)


def _max_pool(emitter: Emitter, node: fx.Node, values: dict[fx.Node, Value]) -> Value | None:
    given = arguments_of(node)
    dims = len(emitter.shapes[node]) - 2
    if dims < 1:
        return None
    kernel = _each(given["kernel_size"], dims)
    stride = _each(given["stride"] or kernel, dims)
    plain = emitter.plain(_input(node, values))
    padding, dilation = _each(given["padding"], dims), _each(given["dilation"], dims)
    pool = (plain.terms[0].node, kernel, stride, padding, dilation, bool(given["ceil_mode"]))
    pooled = emitter.call(_OPS.max_pool.default, pool, f"{node.name}", layer=node.name)
    return emitter.moved(plain, pooled)


def _each(value: Any, dims: int) -> list[int]:
    listed = [int(one) for one in (value if isinstance(value, (list, tuple)) else [value])]
    return listed * dims if len(listed) == 1 else listed


def _averaged(plain: Affine, node: fx.Node, count: int, rank: int) -> Affine:
    """The mean of `count` elements, as their exact sum with a smaller coefficient."""
    term = plain.terms[0]
    coefficient = np.float64(term.coefficient / count)
    node.meta["unit"] = float(coefficient)
    low, high = term.bounds
    summed = Term(node, coefficient, np.float64(min(low * count, 0.0)), np.float64(max(high * count, 0.0)))
    return Affine((summed,), np.float64(0.0), rank, 1, layers=plain.layers)


def _window_average(emitter: Emitter, node: fx.Node, values: dict[fx.Node, Value]) -> Value | None:
    given = arguments_of(node)
    dims = len(emitter.shapes[node]) - 2
    kernel = _each(given["kernel_size"], dims)
    stride = _each(given["stride"] or kernel, dims)
    padding = _each(given["padding"], dims)
    odd_border = any(padding) and not given.get("count_include_pad", True)
    if dims < 1 or given["ceil_mode"] or odd_border or given.get("divisor_override"):
        return None
    plain = emitter.plain(_input(node, values))
    arguments_ = (plain.terms[0].node, kernel, stride, padding)
    summed = emitter.call(_OPS.sum_pool.default, arguments_, node.name, layer=node.name)
    return _averaged(plain, summed, math.prod(kernel), plain.rank)


def _adaptive_average(emitter: Emitter, node: fx.Node, values: dict[fx.Node, Value]) -> Value | None:
    source, target = emitter.shapes[node.all_input_nodes[0]][2:], emitter.shapes[node][2:]
    if any(have % want for have, want in zip(source, target, strict=True)):
        return None
    kernel = [have // want for have, want in zip(source, target, strict=True)]
    plain = emitter.plain(_input(node, values))
    pool = (plain.terms[0].node, kernel, kernel, [0] * len(kernel))
    summed = emitter.call(_OPS.sum_pool.default, pool, node.name, layer=node.name)
    return _averaged(plain, summed, math.prod(kernel), plain.rank)


def _mean(emitter: Emitter, node: fx.Node, values: dict[fx.Node, Value]) -> Value | None:
    given = arguments_of(node)
    shape = emitter.shapes[node.all_input_nodes[0]]
    dims = given.get("dim")
    axes = [int(d) % len(shape) for d in (dims or [])] if not isinstance(dims, int) else [dims % len(shape)]
    if not axes or 0 in axes or given.get("dtype") is not None:
        return None  # a mean over the batch depends on its size
    plain = emitter.plain(_input(node, values))
    keep = bool(given.get("keepdim"))
    target = torch.ops.aten.sum.dim_IntList
    summed = emitter.call(target, (plain.terms[0].node, sorted(axes), keep), node.name, layer=node.name)
    count = math.prod(shape[axis] for axis in axes)
    return _averaged(plain, summed, count, len(emitter.shapes[node]))


def _cat(emitter: Emitter, node: fx.Node, values: dict[fx.Node, Value]) -> Value | None:
    given = arguments_of(node)
    sources = given["tensors"]
    parts = [_as_integers(emitter, one, values) for one in sources]
    if any(part is None for part in parts):
        return None
    plains = [emitter.plain(part) for part in parts if part is not None]
    plains = _of_similar_units(emitter, plains, node.name)
    rank = plains[0].rank
    axis = int(given["dim"]) % rank
    nodes = [plain.terms[0].node for plain in plains]
    joined = emitter.call(torch.ops.aten.cat.default, (nodes, axis), node.name, layer=node.name)
    layers = tuple(dict.fromkeys(layer for plain in plains for layer in plain.layers))
    coefficients = [float(plain.terms[0].coefficient) for plain in plains]
    lows, highs = zip(*(plain.terms[0].bounds for plain in plains), strict=True)
    if len(set(coefficients)) == 1:
        joined.meta["unit"] = coefficients[0]
        term = Term(joined, np.float64(coefficients[0]), np.float64(min(lows)), np.float64(max(highs)))
        return Affine((term,), np.float64(0.0), rank, 1, layers=layers)
    sizes = [emitter.shapes[one][axis] for one in sources]
    scale, low, high = (np.repeat(np.asarray(one, np.float64), sizes) for one in (coefficients, lows, highs))
    return Affine((Term(joined, scale, low, high),), np.float64(0.0), rank, axis, layers=layers)


def _of_similar_units(emitter: Emitter, plains: list[Affine], name: str) -> list[Affine]:
    """Tensors beside a much finer one, as sums of a layer beside a stream, in its unit as far as they fit.

    The multipliers of one summand share 31 bits: where the largest belongs to a coarse channel, those of fine
    channels would be left with few.
    """
    units = [abs(float(plain.terms[0].coefficient)) for plain in plains]
    finest = min(filter(None, units), default=0.0)
    similar = []
    for index, (plain, unit) in enumerate(zip(plains, units, strict=True)):
        if unit > finest * 2**UNIT_SPREAD_BITS:
            epilogue = stream_epilogue(plain, finest)
            if unit > epilogue.unit * 2**UNIT_SPREAD_BITS:
                plain = emitter.epilogue(plain, epilogue, f"{name}.input_{index}")
        similar.append(plain)
    return similar


def _product(emitter: Emitter, node: fx.Node, values: dict[fx.Node, Value]) -> Value | None:
    """A product of codes with codes."""
    left, right = (values[one] for one in node.args if isinstance(one, fx.Node))
    if not (_holds_codes(left) and _holds_codes(right)) or min(left.rank, right.rank) < 2:
        return None
    a, b = left.terms[0], right.terms[0]
    length = emitter.shapes[node.args[0]][-1]
    ends = [x * y * length for x in a.bounds for y in b.bounds]
    bound = int(max(abs(end) for end in ends))
    if bound >= 2**31:
        return None
    sums = emitter.call(
        _OPS.accumulate_product.default, (a.node, b.node, bound), f"{node.name}.accumulate", layer=node.name
    )
    term = Term(sums, a.coefficient * b.coefficient, np.float64(min(ends)), np.float64(max(ends)))
    return Affine((term,), np.float64(0.0), len(emitter.shapes[node]), 1, layers=(node.name,))


def _holds_codes(value: Value) -> TypeGuard[Affine]:
    if not (isinstance(value, Affine) and value.is_plain):
        return False
    low, high = value.terms[0].bounds
    return low >= -128 and high <= 255


def _identity(emitter: Emitter, node: fx.Node, values: dict[fx.Node, Value]) -> Value | None:
    return _input(node, values)


RULES: dict[str, Rule] = {
    "relu": _clip(0.0, None),
    "relu6": _clip(0.0, 6.0),
    "hardtanh": _clip(None, None),
    "clamp": _clip(None, None),
    "clamp_min": _clip(None, None),
    "clamp_max": _clip(None, None),
    "add": _add(1.0),
    "sub": _add(-1.0),
    "mul": _scale,
    "div": _scale,
    "max_pool1d": _max_pool,
    "max_pool2d": _max_pool,
    "max_pool3d": _max_pool,
    "avg_pool1d": _window_average,
    "avg_pool2d": _window_average,
    "avg_pool3d": _window_average,
    "adaptive_avg_pool1d": _adaptive_average,
    "adaptive_avg_pool2d": _adaptive_average,
    "adaptive_avg_pool3d": _adaptive_average,
    "mean": _mean,
    "cat": _cat,
    **dict.fromkeys(PRODUCTS, _product),
    "pad": _move,
    "constant_pad_nd": _move,
    "dropout": _identity,
    "detach": _identity,
    "contiguous": _identity,
    "clone": _identity,
    **dict.fromkeys(LAYOUT - {"detach", "contiguous", "clone"}, _move),
    **dict.fromkeys((f"upsample_nearest{dims}d" for dims in (1, 2, 3)), _upsample_nearest),
}
