"""Which aten overload a torch function, tensor method or Python operator stands for.

Rules are data: `OVERLOADS` lists, for each name, the overloads to try in order; the first whose schema
accepts the arguments is taken. `CALLS` holds the functions of torch.nn.functional whose parameters differ
from aten's.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import OpOverload

_aten = torch.ops.aten


def _overloads(names: str) -> tuple[OpOverload, ...]:
    found = []
    for name in names.split():
        packet, _, overload = name.partition(".")
        found.append(getattr(getattr(_aten, packet), overload or "default"))
    return tuple(found)


def _words(text: str) -> list[str]:
    return text.split()


def _table(*rows: str) -> dict[str, tuple[OpOverload, ...]]:
    """Rows "names...: overloads...", or one word for a name whose only overload is "default"."""
    table = {}
    for row in rows:
        names, colon, overloads = row.partition(":")
        for name in names.split():
            table[name] = _overloads(overloads if colon else name)
    return table


# Names of functions in torch and torch.nn.functional, and of tensor methods.
OVERLOADS: dict[str, tuple[OpOverload, ...]] = _table(
    *_words("""
    relu relu_ relu6 relu6_ hardtanh hardtanh_ sigmoid sigmoid_ silu silu_ gelu tanh tanh_ leaky_relu
    leaky_relu_ prelu hardswish hardswish_ hardsigmoid hardsigmoid_ elu elu_ celu celu_ selu selu_ mish
    mish_ softplus log_sigmoid hardshrink softshrink exp exp_ log log_ sqrt sqrt_ rsqrt abs abs_ neg neg_
    floor floor_ ceil round sign erf reciprocal matmul bmm mm addmm baddbmm linear clamp_ clamp_min clamp_max
    threshold square conv_transpose1d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d reshape view permute t contiguous clone detach unsqueeze expand repeat roll flip
    stack chunk maximum minimum amax amin pixel_shuffle pixel_unshuffle channel_shuffle
    scaled_dot_product_attention rand new_empty full new_full zeros ones zeros_like ones_like rand_like
    new_zeros new_ones einsum narrow diagonal copy_ zero_ index_put index_put_ index_copy index_copy_
    index_add index_add_ scatter_add scatter_add_ select_scatter slice_scatter diagonal_scatter index_select
    gather masked_scatter masked_scatter_
    """),
    "select: select.int",
    "fill_: fill_.Scalar fill_.Tensor",
    "masked_fill: masked_fill.Scalar masked_fill.Tensor",
    "masked_fill_: masked_fill_.Scalar masked_fill_.Tensor",
    "index_fill: index_fill.int_Scalar index_fill.int_Tensor",
    "index_fill_: index_fill_.int_Scalar index_fill_.int_Tensor",
    "scatter: scatter.value scatter.src scatter.value_reduce scatter.reduce",
    "scatter_: scatter_.value scatter_.src scatter_.value_reduce scatter_.reduce",
    "clamp: clamp clamp.Tensor",
    "clip: clamp clamp.Tensor",
    "conv1d: conv1d conv1d.padding",
    "conv2d: conv2d conv2d.padding",
    "conv3d: conv3d conv3d.padding",
    "conv_transpose2d: conv_transpose2d.input",
    "conv_transpose3d: conv_transpose3d.input",
    "flatten: flatten.using_ints",
    "transpose swapaxes swapdims: transpose.int",
    "squeeze: squeeze squeeze.dim squeeze.dims",
    "movedim moveaxis: movedim.int movedim.intlist",
    "unflatten: unflatten.int",
    "cat concat concatenate: cat",
    "split: split.Tensor split.sizes",
    "unbind: unbind.int",
    "add: add.Tensor",
    "add_: add_.Tensor add_.Scalar",
    "sub subtract: sub.Tensor",
    "sub_: sub_.Tensor sub_.Scalar",
    "mul multiply: mul.Tensor",
    "mul_: mul_.Tensor mul_.Scalar",
    "div divide true_divide: div.Tensor div.Tensor_mode",
    "div_: div_.Tensor div_.Scalar",
    "rsub: rsub.Scalar rsub.Tensor",
    "pow: pow.Tensor_Scalar pow.Tensor_Tensor",
    "where: where.self",
    "mean: mean.dim mean",
    "sum: sum.dim_IntList sum",
    "var: var.correction var.dim var",
    "bernoulli: bernoulli bernoulli.p",
    "bernoulli_: bernoulli_.float bernoulli_.Tensor",
    "empty: empty.memory_format",
    "softmax: softmax.int",
    "log_softmax: log_softmax.int",
)

# Python operators between tensors (or a tensor and a number), by the name in OVERLOADS.
OPERATORS: dict[Callable[..., Any], str] = {
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
    operator.truediv: "div",
    operator.neg: "neg",
    operator.pow: "pow",
    operator.matmul: "matmul",
    operator.iadd: "add_",
    operator.isub: "sub_",
    operator.imul: "mul_",
    operator.itruediv: "div_",
    math.sqrt: "sqrt",
}

# What gives no tensor.
PLAIN_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad", "layout")
PLAIN_METHODS = ("size", "dim", "ndimension", "numel", "nelement", "item", "stride", "is_floating_point")

Call = tuple[OpOverload, tuple[Any, ...]]


def _choose(in_place: bool, overload: OpOverload, written: OpOverload) -> OpOverload:
    return written if in_place else overload


def _batch_norm(  # parameters as in torch.nn.functional
    input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Call:  # fmt: skip
    args = (
        input,
        weight,
        bias,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
        torch.backends.cudnn.enabled,
    )
    return _aten.batch_norm.default, args


def _instance_norm(
    input: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Call:  # fmt: skip
    args = (input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps)
    return _aten.instance_norm.default, (*args, torch.backends.cudnn.enabled)


def _layer_norm(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Call:
    return _aten.layer_norm.default, (
        input,
        normalized_shape,
        weight,
        bias,
        eps,
        torch.backends.cudnn.enabled,
    )


def _group_norm(input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Call:
    return _aten.group_norm.default, (input, num_groups, weight, bias, eps, torch.backends.cudnn.enabled)


def _embedding(
    input: Any, weight: Any, padding_idx: int | None = None, max_norm: None = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Call:  # fmt: skip
    index = -1 if padding_idx is None else padding_idx
    return _aten.embedding.default, (weight, input, index, scale_grad_by_freq, sparse)


def _dropout(overload: OpOverload, written: OpOverload) -> Callable[..., Call]:
    def call(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Call:
        return _choose(inplace, overload, written), (input, p, training)

    return call


def _max_pool(overload: OpOverload) -> Callable[..., Call | None]:
    def call(
        input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> Call | None:  # fmt: skip
        if return_indices:
            return None
        return overload, (input, kernel_size, [] if stride is None else stride, padding, dilation, ceil_mode)

    return call


def _softmax(overload: OpOverload) -> Callable[..., Call | None]:
    def call(input: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Call | None:
        return None if dim is None or dtype is not None else (overload, (input, dim))

    return call


def _pad(input: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Call:
    return _aten.pad.default, (input, pad, mode, value)


_feature_dropout = _dropout(_aten.feature_dropout.default, _aten.feature_dropout_.default)
CALLS: dict[Callable[..., Any], Callable[..., Call | None]] = {
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.embedding: _embedding,
    F.dropout: _dropout(_aten.dropout.default, _aten.dropout_.default),
    F.dropout1d: _feature_dropout,
    F.dropout2d: _feature_dropout,
    F.dropout3d: _feature_dropout,
    F.alpha_dropout: _dropout(_aten.alpha_dropout.default, _aten.alpha_dropout_.default),
    F.feature_alpha_dropout: _dropout(
        _aten.feature_alpha_dropout.default, _aten.feature_alpha_dropout_.default
    ),
    F.max_pool1d: _max_pool(_aten.max_pool1d.default),
    F.max_pool2d: _max_pool(_aten.max_pool2d.default),
    F.max_pool3d: _max_pool(_aten.max_pool3d.default),
    F.softmax: _softmax(_aten.softmax.int),
    F.log_softmax: _softmax(_aten.log_softmax.int),
    F.pad: _pad,
}
