"""Layers that stay in float, as calls of the aten operators that their modules make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile.errors import PassError

from .attention import ScaledDotProductAttention
from .batchnorm import ModeBatchNorm
from .borrowed_weights import BorrowedWeights
from .geometry import Geometry

_ATEN = torch.ops.aten
_CONVOLUTIONS: dict[type[nn.Module], Any] = {
    nn.Conv1d: _ATEN.conv1d,
    nn.Conv2d: _ATEN.conv2d,
    nn.Conv3d: _ATEN.conv3d,
}
_CONVOLUTIONS_BY_RANK = {1: _ATEN.conv1d, 2: _ATEN.conv2d, 3: _ATEN.conv3d}
_TRANSPOSED: dict[type[nn.Module], Any] = {
    nn.ConvTranspose1d: _ATEN.conv_transpose1d.default,
    nn.ConvTranspose2d: _ATEN.conv_transpose2d.input,
    nn.ConvTranspose3d: _ATEN.conv_transpose3d.input,
}

_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


@dataclass(frozen=True)
class Call:
    """A call of an aten operator.

    Attributes:
        target: the overload.
        args, kwargs: its arguments; nodes of the graph under construction among them.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


def layer_call(geometry: Geometry, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> Call:
    """The aten call of a convolution or linear layer of a given geometry."""
    if geometry.kind == "linear":
        return Call(_ATEN.linear.default, (x, weight, bias))
    overloads = _CONVOLUTIONS_BY_RANK[len(geometry.stride)]
    stride, dilation = list(geometry.stride), list(geometry.dilation)
    if all(before == after for before, after in geometry.padding):
        padding = [before for before, _ in geometry.padding]
        return Call(overloads.default, (x, weight, bias, stride, padding, dilation, geometry.groups))
    # only padding="same" is lopsided
    return Call(overloads.padding, (x, weight, bias, stride, "same", dilation, geometry.groups))


def float_call(
    module: Any, inputs: Sequence[fx.Node], constant: Callable[[str, Tensor], fx.Node], row: int, name: str
) -> Call:
    """The aten call of a layer.

    Args:
        module: the layer.
        inputs: its float inputs.
        constant: makes a buffer of the graph under construction from (part, tensor).
        row: row of per-mode parameters.
        name: module path, for errors.

    Raises:
        PassError: for a module without such a form.
    """

    def part(key: str, value: Tensor | None = None) -> fx.Node | None:
        value = getattr(module, key) if value is None else value
        return None if value is None else constant(key, value)

    x = inputs[0]
    if isinstance(module, ScaledDotProductAttention):
        mask = inputs[3] if len(inputs) > 3 else None
        return Call(
            _ATEN.scaled_dot_product_attention.default,
            (*inputs[:3], mask, 0.0, module.is_causal),
            {"scale": module.scale, "enable_gqa": module.enable_gqa},
        )
    kind = module.kind if isinstance(module, BorrowedWeights) else type(module)
    if kind in _CONVOLUTIONS:
        overloads = _CONVOLUTIONS[kind]
        named = isinstance(module.padding, str)
        padding = module.padding if named else list(module.padding)
        shape = (list(module.stride), padding, list(module.dilation), module.groups)
        overload = overloads.padding if named else overloads.default
        return Call(overload, (x, part("weight"), part("bias"), *shape))
    if kind in _TRANSPOSED:
        moves = (list(module.stride), list(module.padding), list(module.output_padding), module.groups)
        return Call(_TRANSPOSED[kind], (x, part("weight"), part("bias"), *moves, list(module.dilation)))
    if isinstance(module, nn.Linear):
        return Call(_ATEN.linear.default, (x, part("weight"), part("bias")))
    if isinstance(module, nn.LayerNorm):
        return Call(
            _ATEN.layer_norm.default,
            (
                x,
                list(module.normalized_shape),
                part("weight"),
                part("bias"),
                module.eps,
            ),
        )
    if isinstance(module, nn.GroupNorm):
        return Call(
            _ATEN.group_norm.default, (x, module.num_groups, part("weight"), part("bias"), module.eps)
        )
    if isinstance(module, _INSTANCE_NORMS):
        own = not module.track_running_stats
        statistics = (None, None) if own else (part("running_mean"), part("running_var"))
        scales = (part("weight"), part("bias"))
        return Call(_ATEN.instance_norm.default, (x, *scales, *statistics, own, 0.0, module.eps, False))
    if isinstance(module, nn.Embedding):
        return Call(_ATEN.embedding.default, (part("weight"), x))
    if isinstance(module, ModeBatchNorm):  # without running statistics: normalises by the batch
        affine, _ = module.rows_of(row)
        weight = None if module.weight is None else part("weight", module.weight[affine])
        bias = None if module.bias is None else part("bias", module.bias[affine])
        return Call(_ATEN.batch_norm.default, (x, weight, bias, None, None, True, 0.0, module.eps, False))
    raise PassError(
        f"layer {name!r}: {kind.__name__} has no form in an integer graph; write it with operators of "
        "torch.nn.functional, or replace it"
    )
