"""Float operators that compare, choose, fill and scatter elements, as ONNX operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import helper
from torch import fx

from .islands import Island, Writer

#: Types that all of ONNX's comparisons take in every runtime.
_COMPARED = (np.float32, np.float64, np.int32, np.int64)


def _compare(operator: str, negated: bool = False) -> Writer:
    def write(op: Island) -> str | None:
        first, second = op.given["self"], op.given["other"]
        dtypes = {op.emitter.dtype(one) for one in (first, second) if isinstance(one, fx.Node)}
        if len(dtypes) != 1 or (dtype := dtypes.pop()) not in _COMPARED:
            return None
        if any(isinstance(one, float) for one in (first, second)) and dtype.kind != "f":
            return None  # whole numbers against a fraction
        given = [op.tensor("self", dtype), op.tensor("other", dtype)]
        if not negated:
            return op.emit(operator, given)
        return op.emit("Not", [op.emit(operator, given, ".equal")])

    return write


def _logical(operator: str) -> Writer:
    def write(op: Island) -> str | None:
        keys = [key for key in ("self", "other") if key in op.given]
        nodes = [op.given[key] for key in keys]
        if any(not isinstance(one, fx.Node) or op.emitter.dtype(one) != np.bool_ for one in nodes):
            return None
        return op.emit(operator, [op.tensor(key) for key in keys])

    return write


def _where(op: Island) -> str | None:
    if op.emitter.dtype(op.given["condition"]) != np.bool_:
        return None
    dtype = op.emitter.dtype(op.node)
    return op.emit("Where", [op.tensor("condition"), op.tensor("self", dtype), op.tensor("other", dtype)])


def _masked_fill(op: Island) -> str:
    dtype = op.emitter.dtype(op.node)
    return op.emit("Where", [op.tensor("mask"), op.tensor("value", dtype), op.tensor("self")])


def _to(op: Island) -> str:
    kind = int(helper.np_dtype_to_tensor_dtype(op.emitter.dtype(op.node)))
    return op.emit("Cast", [op.tensor("self")], to=kind)


def _filled(op: Island) -> str:
    """zeros, full_like and the like: the same number everywhere."""
    value = op.given.get("fill_value", 1 if "ones" in str(op.node.target) else 0)
    number = op.constant("value", value, op.emitter.dtype(op.node))
    return op.emit("Expand", [number, op.constant("shape", list(op.emitter.shape(op.node)), np.int64)])


def _range(op: Island) -> str | None:
    numbers = [op.given.get("start", 0), op.given["end"], op.given.get("step", 1)]
    if any(isinstance(one, fx.Node) for one in numbers):
        return None
    dtype = op.emitter.dtype(op.node)
    values: Any = torch.arange(*numbers, dtype=torch.from_numpy(np.empty(0, dtype)).dtype).numpy()
    return op.emit("Identity", [op.constant("range", values, dtype)])


def _scatter(reduction: str) -> Writer:
    def write(op: Island) -> str | None:
        if op.given.get("reduce") is not None:
            return None
        dtype, inputs = op.emitter.dtype(op.node), [op.tensor("self"), op.tensor("index")]
        if "src" in op.given:
            if op.shape("src") != op.shape("index"):
                return None
            inputs.append(op.tensor("src"))
        else:
            number = op.constant("value", op.given["value"], dtype)
            shape = op.constant("shape", list(op.shape("index")), np.int64)
            inputs.append(op.emit("Expand", [number, shape], ".values"))
        return op.emit("ScatterElements", inputs, axis=int(op.given["dim"]), reduction=reduction)

    return write


def _gather(op: Island) -> str:
    return op.emit("GatherElements", [op.tensor("self"), op.tensor("index")], axis=int(op.given["dim"]))


def _remainder(op: Island) -> str | None:
    dtype = op.emitter.dtype(op.node)
    if dtype.kind != "i" or isinstance(op.given["other"], fx.Node):
        return None
    return op.emit("Mod", [op.tensor("self", dtype), op.tensor("other", dtype)])


CHOICES: dict[str, Writer] = {
    "eq": _compare("Equal"),
    "ne": _compare("Equal", negated=True),
    "lt": _compare("Less"),
    "le": _compare("LessOrEqual"),
    "gt": _compare("Greater"),
    "ge": _compare("GreaterOrEqual"),
    **dict.fromkeys(("logical_not", "bitwise_not"), _logical("Not")),
    **dict.fromkeys(("logical_and", "bitwise_and", "__and__"), _logical("And")),
    **dict.fromkeys(("logical_or", "bitwise_or", "__or__"), _logical("Or")),
    "where": _where,
    "masked_fill": _masked_fill,
    "to": _to,
    **dict.fromkeys(("zeros", "ones", "full", "zeros_like", "ones_like", "full_like"), _filled),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full"), _filled),
    "arange": _range,
    "scatter": _scatter("none"),
    "scatter_add": _scatter("add"),
    "gather": _gather,
    "remainder": _remainder,
}
