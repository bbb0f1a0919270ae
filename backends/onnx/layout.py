"""Operators that move, select or repeat elements, of codes, high-precision integers and floats alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import fx

from qcompile.errors import LoweringError
from qcompile.passes.aten import arguments_of, aten_name

from .emit import Emitter, layer_of
from .forms import channels_first, reshaped, uniform
from .values import Accumulators, Codes, Plain, Real, Value, scalar

#: Emits one operator on a tensor: (emitter, node, name of the input, value of an integer 0) -> name.
Rebuild = Callable[[str, tuple[int, ...]], Value]
Move = Callable[[Emitter, fx.Node, str, int], str]


def moved(move: Move) -> Callable[[Emitter, fx.Node], Value]:
    """The rule of an operator that returns one tensor."""

    def rule(emitter: Emitter, node: fx.Node) -> Value:
        name, rebuild, zero = movable(emitter, node)
        return rebuild(move(emitter, node, name, zero), emitter.shape(node))

    return rule


def movable(emitter: Emitter, node: fx.Node) -> tuple[str, Rebuild, int]:
    """The first input as a tensor whose elements mean the same everywhere.

    Returns:
        Its name, what makes a value of a moved tensor's name and shape, and how an integer 0 is stored.
    """
    value = emitter.value(node.all_input_nodes[0])
    if isinstance(value, Codes):
        codes = channels_first(emitter, value)
        codes = replace(codes, low=min(codes.low, 0), high=max(codes.high, 0))
        return codes.name, lambda name, shape: replace(codes, name=name, shape=shape), codes.zero_point
    if isinstance(value, (Accumulators, Real)):
        real = channels_first(emitter, uniform(emitter, value))
        low, high = scalar(min(real.low.min(), 0.0)), scalar(max(real.high.max(), 0.0))
        return real.name, lambda name, shape: Real(name, shape, real.factor, low, high), 0
    return emitter.tensor(node.all_input_nodes[0]), lambda name, shape: Plain(name), 0


def identity(emitter: Emitter, node: fx.Node) -> Value:
    """The input itself."""
    return emitter.value(node.all_input_nodes[0])


def _reshape(emitter: Emitter, node: fx.Node, source: str, zero: int) -> str:
    return reshaped(emitter, source, emitter.shape(node), node.name, layer_of(node))


def _transposed(emitter: Emitter, source: str, order: Sequence[int], output: str, layer: str) -> str:
    return emitter.builder.node("Transpose", [source], output, f"{layer}/transpose", perm=list(order))


def _permute(emitter: Emitter, node: fx.Node, source: str, zero: int) -> str:
    given = {key: emitter.static(value) for key, value in arguments_of(node).items() if key != "self"}
    rank = len(emitter.shape(node))
    order = list(range(rank))
    if "dims" in given:
        order = [int(one) % rank for one in given["dims"]]
    elif "source" in given:
        order = _moveaxis(rank, _listed(given["source"]), _listed(given["destination"]))
    elif aten_name(node) == "numpy_T":
        order.reverse()
    elif rank > 1:
        a, b = int(given.get("dim0", 0)) % rank, int(given.get("dim1", 1)) % rank
        order[a], order[b] = order[b], order[a]
    return _transposed(emitter, source, order, node.name, layer_of(node))


def _listed(value: Any) -> list[int]:
    return [int(one) for one in value] if isinstance(value, (list, tuple)) else [int(value)]


def _moveaxis(rank: int, source: Sequence[int], destination: Sequence[int]) -> list[int]:
    order = [axis for axis in range(rank) if axis not in [one % rank for one in source]]
    for target, origin in sorted(zip((d % rank for d in destination), source, strict=True)):
        order.insert(target, origin % rank)
    return order


def _sliced(
    emitter: Emitter, source: str, axis: int, start: int, stop: int, step: int, output: str, layer: str
) -> str:
    names = [
        emitter.builder.initializer(f"{layer}/{what}", [number], np.int64)
        for what, number in (("start", start), ("stop", stop), ("axis", axis), ("step", step))
    ]
    return emitter.builder.node("Slice", [source, *names], output, f"{layer}/slice")


def _select(emitter: Emitter, node: fx.Node, source: str, zero: int) -> str:
    given = {key: emitter.static(value) for key, value in arguments_of(node).items() if key != "self"}
    shape = emitter.shape(node.all_input_nodes[0])
    axis = int(given["dim"]) % len(shape)
    if "index" in given:
        start = int(given["index"]) % shape[axis]
        stop, step = start + 1, 1
    else:
        step = int(given.get("step") or 1)
        first = int(given["start"] or 0)
        start = min(max(first + shape[axis] if first < 0 else first, 0), shape[axis])
        stop = start + emitter.shape(node)[axis] * step
    kept = len(emitter.shape(node)) == len(shape)
    name = node.name if kept else f"{node.name}.slice"
    name = _sliced(emitter, source, axis, start, stop, step, name, layer_of(node))
    return name if kept else _reshape(emitter, node, name, zero)


def _expand(emitter: Emitter, node: fx.Node, source: str, zero: int) -> str:
    sizes = emitter.builder.initializer(f"{layer_of(node)}/shape", list(emitter.shape(node)), np.int64)
    return emitter.builder.node("Expand", [source, sizes], node.name, f"{layer_of(node)}/expand")


def _pad(emitter: Emitter, node: fx.Node, source: str, zero: int) -> str:
    given = {key: emitter.static(value) for key, value in arguments_of(node).items() if key != "self"}
    layer, mode = layer_of(node), given.get("mode", "constant")
    amounts = [int(one) for one in given["pad"]]
    rank = len(emitter.shape(node))
    pairs = [(0, 0)] * (rank - len(amounts) // 2) + list(zip(amounts[::2], amounts[1::2], strict=True))[::-1]
    if mode == "circular":
        return _wrapped(emitter, node, source, pairs)
    kinds = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    pads = emitter.builder.initializer(f"{layer}/pads", list(np.asarray(pairs).T.reshape(-1)), np.int64)
    inputs = [source, pads]
    if mode == "constant":
        dtype = np.uint8 if _is_codes(emitter, node) else _float_type(emitter, node)
        fill = zero if zero or not given.get("value") else given["value"]
        inputs.append(emitter.builder.initializer(f"{layer}/padding_value", fill, dtype))
    return emitter.builder.node("Pad", inputs, node.name, f"{layer}/pad", mode=kinds[mode])


def _is_codes(emitter: Emitter, node: fx.Node) -> bool:
    return isinstance(emitter.value(node.all_input_nodes[0]), Codes)


def _float_type(emitter: Emitter, node: fx.Node) -> Any:
    integers = isinstance(emitter.value(node.all_input_nodes[0]), (Accumulators, Real))
    return np.float32 if integers else emitter.dtype(node)


def _wrapped(emitter: Emitter, node: fx.Node, source: str, pairs: Sequence[tuple[int, int]]) -> str:
    shape, layer = list(emitter.shape(node.all_input_nodes[0])), layer_of(node)
    for axis, (before, after) in enumerate(pairs):
        size, parts = shape[axis], [source]
        if before:
            end = f"{node.name}.end_{axis}"
            parts.insert(0, _sliced(emitter, source, axis, size - before, size, 1, end, layer))
        if after:
            parts.append(_sliced(emitter, source, axis, 0, after, 1, f"{node.name}.begin_{axis}", layer))
        if before or after:
            name = f"{node.name}.wrapped_{axis}"
            source = emitter.builder.node("Concat", parts, name, f"{layer}/wrap", axis=axis)
    return source


def _shuffle(emitter: Emitter, node: fx.Node, source: str, zero: int) -> str:
    """channel_shuffle, pixel_shuffle and pixel_unshuffle: split axes, permute, merge."""
    given = {key: emitter.static(value) for key, value in arguments_of(node).items() if key != "self"}
    shape = emitter.shape(node.all_input_nodes[0])
    if "groups" in given:
        groups = int(given["groups"])
        split, order = [shape[0], groups, shape[1] // groups, *shape[2:]], [0, 2, 1]
        order += range(3, len(split))
    elif "upscale_factor" in given:
        r, (n, c, h, w) = int(given["upscale_factor"]), shape
        split, order = [n, c // r**2, r, r, h, w], [0, 1, 4, 2, 5, 3]
    else:
        r, (n, c, h, w) = int(given["downscale_factor"]), shape
        split, order = [n, c, h // r, r, w // r, r], [0, 1, 3, 5, 2, 4]
    layer = layer_of(node)
    name = reshaped(emitter, source, split, f"{node.name}.split", layer)
    name = _transposed(emitter, name, order, f"{node.name}.permuted", layer)
    return _reshape(emitter, node, name, zero)


def _repeat_interleave(emitter: Emitter, node: fx.Node, source: str, zero: int) -> str:
    given = {key: emitter.static(value) for key, value in arguments_of(node).items() if key != "self"}
    if given.get("dim") is None or not isinstance(given.get("repeats"), int):
        raise LoweringError(f"layer {layer_of(node)!r}: repeat_interleave needs a number and a dimension")
    shape, layer, repeats = emitter.shape(node.all_input_nodes[0]), layer_of(node), given["repeats"]
    axis = int(given["dim"]) % len(shape)
    name = reshaped(emitter, source, [*shape[: axis + 1], 1, *shape[axis + 1 :]], f"{node.name}.split", layer)
    wide = [*shape[: axis + 1], repeats, *shape[axis + 1 :]]
    sizes = emitter.builder.initializer(f"{layer}/repeated_shape", wide, np.int64)
    name = emitter.builder.node("Expand", [name, sizes], f"{node.name}.repeated", f"{layer}/expand")
    return _reshape(emitter, node, name, zero)


def _upsample(emitter: Emitter, node: fx.Node, source: str, zero: int) -> str:
    sizes = emitter.builder.initializer(f"{layer_of(node)}/sizes", list(emitter.shape(node)), np.int64)
    return emitter.builder.node(
        "Resize",
        [source, "", "", sizes],
        node.name,
        f"{layer_of(node)}/resize",
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


def _index_select(emitter: Emitter, node: fx.Node, source: str, zero: int) -> str:
    given = arguments_of(node)
    axis = int(emitter.static(given["dim"])) % len(emitter.shape(node))
    inputs = [source, emitter.tensor(given["index"])]
    return emitter.builder.node("Gather", inputs, node.name, f"{layer_of(node)}/gather", axis=axis)


def split(emitter: Emitter, node: fx.Node) -> Value:
    """chunk, split, split_with_sizes and unbind: a tuple of values."""
    name, rebuild, _ = movable(emitter, node)
    given = {key: emitter.static(value) for key, value in arguments_of(node).items() if key != "self"}
    rank, shapes, layer = len(emitter.shape(node.all_input_nodes[0])), emitter.shapes(node), layer_of(node)
    axis, parts, start = int(given.get("dim", 0)) % rank, [], 0
    for index, shape in enumerate(shapes):
        kept = len(shape) == rank
        size = shape[axis] if kept else 1
        part = f"{node.name}.part_{index}"
        part = _sliced(emitter, name, axis, start, start + size, 1, part, layer)
        if not kept:
            part = reshaped(emitter, part, shape, f"{part}.flat", layer)
        parts.append(rebuild(part, shape))
        start += size
    return tuple(parts)


def pick(emitter: Emitter, node: fx.Node) -> Value:
    """`getitem` of a tuple."""
    return emitter.value(node.args[0])[emitter.static(node.args[1])]


MOVES: dict[str, Move] = {
    **dict.fromkeys(("flatten", "view", "reshape", "_unsafe_view", "unflatten"), _reshape),
    **dict.fromkeys(("squeeze", "unsqueeze"), _reshape),
    **dict.fromkeys(("permute", "transpose", "t", "movedim", "numpy_T"), _permute),
    **dict.fromkeys(("slice", "select", "narrow"), _select),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("channel_shuffle", "pixel_shuffle", "pixel_unshuffle"), _shuffle),
    **dict.fromkeys(("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"), _upsample),
    "expand": _expand,
    "repeat_interleave": _repeat_interleave,
    "index_select": _index_select,
}
