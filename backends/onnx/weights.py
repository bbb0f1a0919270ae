"""Integer weights: as int8, or packed at 4 or 2 bits with the nodes that make int8 of them.

ONNX has no types between INT2, INT4 and INT8, so codes of 1 bit take two bits and those of 3 bits four.
What a kernel multiplies is `slope * code + intercept` per channel: the compensation of a scheme, a sign, a
factor that fills int8. Runtimes compute these nodes once, when they load the model, and fuse as if int8 were
stored.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto
from torch import fx

from .emit import Emitter

_INT2, _UINT2 = np.dtype(ml_dtypes.int2), np.dtype(ml_dtypes.uint2)
_INT4, _UINT4 = np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.uint4)

#: (lowest code, highest code, element type, oldest operator set), narrowest first.
_CONTAINERS = ((-2, 1, _INT2, 25), (0, 3, _UINT2, 25), (-8, 7, _INT4, 21), (0, 15, _UINT4, 21))


def stored_weight(
    emitter: Emitter, layer: str, what: str, values: NDArray[Any], codes: NDArray[Any], axis: int
) -> str:
    """Name of a tensor that holds int8 values; stored as codes if the target packs and that is smaller.

    Args:
        emitter: the walk.
        layer, what: names of the constant.
        values: what a kernel multiplies, int8.
        codes: the weight codes, of the same shape.
        axis: the dimension of output channels.
    """
    builder = emitter.builder
    container = _container(codes, builder.opset) if emitter.packed else None
    maps = _per_channel_map(values, codes, axis) if container is not None else None
    if container is None or maps is None:
        return builder.initializer(f"{layer}/{what}", values, np.int8)
    slope, intercept = maps
    name = builder.initializer(f"{layer}/{what}", codes, container)
    if (slope == 1).all() and not intercept.any():
        return _cast(emitter, name, layer, what, TensorProto.INT8)
    # runtimes have no int8 arithmetic, but all of them have int32
    name = _cast(emitter, name, layer, what, TensorProto.INT32)
    for operator, constant, part in (("Mul", slope, "slope"), ("Add", intercept, "intercept")):
        same = (constant == constant.flat[0]).all()
        operand = builder.initializer(
            f"{layer}/{what}_{part}", constant.flat[0] if same else constant, np.int32
        )
        name = builder.node(operator, [name, operand], f"{layer}/{what}_mapped", f"{layer}/{what}_{part}")
    return _cast(emitter, name, layer, what, TensorProto.INT8)


def real_weight(emitter: Emitter, node: fx.Node, codes: NDArray[Any]) -> str:
    """Name of the float tensor that `dequantize` makes of weight codes; runtimes compute it once.

    Args:
        emitter: the walk.
        node: the `dequantize`.
        codes: the integers that it reads, dimension 0 the output channels.
    """
    layer = str(node.meta["layer"])
    name = stored_weight(emitter, layer, "weight", codes, codes, axis=0)
    name = emitter.builder.node("Cast", [name], f"{node.name}.values", f"{layer}/weight_values", to=1)
    for operator, constant in (("Mul", node.args[1]), ("Add", node.args[2])):
        values, what = emitter.constant(constant), f"{layer}/weight_{operator.lower()}"
        if operator == "Mul" or values.any():
            operand = emitter.builder.initializer(f"{what}_by", values, np.float32)
            name = emitter.builder.node(operator, [name, operand], f"{node.name}.{operator}", what)
    return name


def _cast(emitter: Emitter, tensor: str, layer: str, what: str, to: int) -> str:
    return emitter.builder.node("Cast", [tensor], f"{layer}/{what}_integers", f"{layer}/{what}_cast", to=to)


def _container(codes: NDArray[Any], opset: int) -> np.dtype[Any] | None:
    low, high = int(codes.min()), int(codes.max())
    for smallest, largest, dtype, oldest in _CONTAINERS:
        if smallest <= low and high <= largest and oldest <= opset:
            return dtype
    return None


def _per_channel_map(
    values: NDArray[Any], codes: NDArray[Any], axis: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """(slope, intercept), broadcastable, with values = slope * codes + intercept; None if there are none."""
    rows = np.moveaxis(codes.astype(np.int64), axis, 0).reshape(codes.shape[axis], -1)
    wanted = np.moveaxis(values.astype(np.int64), axis, 0).reshape(rows.shape)
    index = np.arange(len(rows))
    least, most = rows.argmin(1), rows.argmax(1)
    span = np.maximum(rows[index, most] - rows[index, least], 1)
    slope = (wanted[index, most] - wanted[index, least]) // span
    intercept = wanted[index, least] - slope * rows[index, least]
    if not np.array_equal(slope[:, None] * rows + intercept[:, None], wanted):
        return None
    shape = [1] * codes.ndim
    shape[axis] = -1
    return slope.reshape(shape), intercept.reshape(shape)
