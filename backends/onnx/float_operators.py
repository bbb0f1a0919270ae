"""Operators of float islands that CNNs use, as ONNX operators; `torch_operator` has the rest."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import fx

from .choice_operators import CHOICES
from .fused import conv_attributes
from .islands import Island, Writer
from .values import Constant
from .windows import emit_average_pool, emit_max_pool, emit_mean


def _unary(operator: str, **attributes: Any) -> Writer:
    return lambda op: op.emit(operator, [op.tensor("self")], **attributes)


def _binary(operator: str) -> Writer:
    def write(op: Island) -> str | None:
        if op.given.get("rounding_mode"):
            return None
        dtype = op.emitter.dtype(op.node)
        left, right = op.tensor("self", dtype), op.tensor("other", dtype)
        alpha = op.given.get("alpha", 1)
        if alpha != 1:
            right = op.emit("Mul", [right, op.constant("alpha", alpha, dtype)], ".scaled")
        return op.emit(operator, [left, right])

    return write


def _clip(low: float | None, high: float | None) -> Writer:
    def write(op: Island) -> str | None:
        given = op.given
        bottom = given.get("min_val", given.get("min", low)) if low is None else low
        top = given.get("max_val", given.get("max", high)) if high is None else high
        if isinstance(bottom, fx.Node) or isinstance(top, fx.Node):
            return None
        dtype = op.emitter.dtype(op.node)
        bounds = ["" if v is None else op.constant(w, v, dtype) for w, v in (("min", bottom), ("max", top))]
        return op.emit("Clip", [op.tensor("self", dtype), *bounds])

    return write


def _silu(op: Island) -> str:
    x = op.tensor("self")
    return op.emit("Mul", [x, op.emit("Sigmoid", [x], ".gate")])


def _gelu(op: Island) -> str | None:
    if op.given["approximate"] != "none":
        return None
    x, dtype = op.tensor("self"), op.emitter.dtype(op.node)
    ratio = op.emit("Div", [x, op.constant("sqrt_2", math.sqrt(2.0), dtype)], ".ratio")
    error = op.emit("Erf", [ratio], ".erf")
    raised = op.emit("Add", [error, op.constant("one", 1.0, dtype)], ".raised")
    product = op.emit("Mul", [x, raised], ".product")
    return op.emit("Mul", [product, op.constant("half", 0.5, dtype)])


def _conv(op: Island) -> str | None:
    shape, dims = op.shape("weight"), op.spatial
    stride, dilation = _each(op.given["stride"], dims), _each(op.given["dilation"], dims)
    if isinstance(op.given["padding"], str):
        total = [d * (k - 1) for d, k in zip(dilation, shape[2:], strict=True)]
        total = total if op.given["padding"] == "same" else [0] * dims
        pairs = [one for t in total for one in (t // 2, t - t // 2)]
    else:
        pairs = [one for p in _each(op.given["padding"], dims) for one in (p, p)]
    inputs = [op.tensor("input"), op.tensor("weight")]
    inputs += [op.tensor("bias")] if op.given["bias"] is not None else []
    attributes = conv_attributes(stride, pairs, dilation, int(op.given["groups"]), shape[2:])
    return op.emit("Conv", inputs, **attributes)


def _linear(op: Island) -> str:
    weight = op.emitter.value(op.given["weight"])
    if isinstance(weight, Constant):
        turned = op.emitter.builder.initializer(weight.name, weight.array.T)
    else:
        turned = op.emit("Transpose", [op.tensor("weight")], ".turned", perm=[1, 0])
    if op.given["bias"] is None:
        return op.emit("MatMul", [op.tensor("input"), turned])
    if len(op.emitter.shape(op.node)) == 2:
        return op.emit("Gemm", [op.tensor("input"), turned, op.tensor("bias")])
    return op.emit("Add", [op.emit("MatMul", [op.tensor("input"), turned], ".product"), op.tensor("bias")])


def _matmul(other: str) -> Writer:
    return lambda op: op.emit("MatMul", [op.tensor("self"), op.tensor(other)])


def _softmax(operator: str) -> Writer:
    def write(op: Island) -> str | None:
        plain = op.given.get("dtype") is None and not op.given.get("half_to_float")
        return op.emit(operator, [op.tensor("self")], axis=int(op.given["dim"])) if plain else None

    return write


def _layer_norm(op: Island) -> str:
    dims = [int(one) for one in op.given["normalized_shape"]]
    weight = op.constant("weight", np.ones(dims)) if op.given["weight"] is None else op.tensor("weight")
    inputs = [op.tensor("input"), weight]
    inputs += [op.tensor("bias")] if op.given["bias"] is not None else []
    return op.emit("LayerNormalization", inputs, axis=-len(dims), epsilon=float(op.given["eps"]))


def _each(value: Any, dims: int) -> list[int]:
    listed = [int(one) for one in (value if isinstance(value, (list, tuple)) else [value])]
    return listed * dims if len(listed) == 1 else listed


def _max_pool(op: Island) -> str | None:
    kernel = _each(op.given["kernel_size"], op.spatial)
    stride = _each(op.given["stride"] or kernel, op.spatial)
    padding, dilation = (_each(op.given[key], op.spatial) for key in ("padding", "dilation"))
    return emit_max_pool(op.emitter, op.node, op.tensor("self"), kernel, stride, padding, dilation)


def _average_pool(op: Island) -> str | None:
    if op.given["ceil_mode"] or op.given.get("divisor_override"):
        return None
    kernel = _each(op.given["kernel_size"], op.spatial)
    stride = _each(op.given["stride"] or kernel, op.spatial)
    padding, inside = _each(op.given["padding"], op.spatial), bool(op.given["count_include_pad"])
    return emit_average_pool(op.emitter, op.node, op.tensor("self"), kernel, stride, padding, inside)


def _adaptive_average(op: Island) -> str | None:
    have, want = op.shape("self")[2:], op.emitter.shape(op.node)[2:]
    if any(old % new for old, new in zip(have, want, strict=True)):
        return None
    kernel = [old // new for old, new in zip(have, want, strict=True)]
    zeros = [0] * len(kernel)
    return emit_average_pool(op.emitter, op.node, op.tensor("self"), kernel, kernel, zeros, True)


def _mean(op: Island) -> str | None:
    if op.given.get("dtype") is not None or not op.given.get("dim"):
        return None
    axes = _each(op.given["dim"], 1)
    return emit_mean(op.emitter, op.node, op.tensor("self"), axes, bool(op.given["keepdim"]))


def _embedding(op: Island) -> str:
    return op.emit("Gather", [op.tensor("weight"), op.tensor("indices")], axis=0)


WRITERS: dict[str, Writer] = {
    **{name: _unary(name.capitalize()) for name in ("relu", "sigmoid", "tanh", "exp", "sqrt", "neg", "abs")},
    **{name: _binary(name.capitalize()) for name in ("add", "sub", "mul", "div")},
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), _max_pool),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), _average_pool),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"), _adaptive_average),
    **dict.fromkeys(("hardtanh", "clamp"), _clip(None, None)),
    "relu6": _clip(0.0, 6.0),
    "hardswish": _unary("HardSwish"),
    "hardsigmoid": _unary("HardSigmoid", alpha=1.0 / 6.0, beta=0.5),
    "silu": _silu,
    "gelu": _gelu,
    "linear": _linear,
    "matmul": _matmul("other"),
    "bmm": _matmul("mat2"),
    "mm": _matmul("mat2"),
    "softmax": _softmax("Softmax"),
    "_softmax": _softmax("Softmax"),
    "log_softmax": _softmax("LogSoftmax"),
    "layer_norm": _layer_norm,
    "mean": _mean,
    "embedding": _embedding,
    **CHOICES,
}
