"""Rounding of activations, and layers that round again in their backward instead of keeping the result.

A layer on a rounded input would save that input for the gradient of its weight, beside the tensor before
rounding, which normalisation or activation functions save anyway. Rounding is cheap, so `apply_layer` saves
the latter only: a training step then keeps what the float network keeps. Compilers decide this for themselves
(their partitioner recomputes cheap operators), so it is for eager code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from qcompile.errors import InvalidArgument

from .geometry import Geometry

#: A code: a number where the mode is uniform, a () tensor where a policy decides it.
Bound: TypeAlias = "float | Tensor"

_NOTE = "_qcompile_rounding"


def rounded(x: Tensor, step: Tensor, low: Any, high: Any) -> Tensor:
    """step * clip(round(x / step), low, high), ties to even, in the dtype of `x`.

    Half types divide in single precision: their own quotients would move values over the ties.
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        return (x.float() / step.float()).clamp_(low, high).round_().mul_(step.float()).to(x.dtype)
    return (x / step).clamp_(low, high).round_().mul_(step)


def save_operands(ctx: Any, *operands: Any) -> None:
    """Keep what a backward needs: a mode's constants are numbers, a policy's are tensors."""
    ctx.numbers = [None if isinstance(one, Tensor) else one for one in operands]
    ctx.save_for_backward(*[one for one in operands if isinstance(one, Tensor)])


def saved_operands(ctx: Any) -> list[Any]:
    """What `save_operands` kept, in its order.

    Raises:
        InvalidArgument: under `create_graph=True`, as hand-written backwards have no second derivative.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise InvalidArgument("quantisers have first derivatives only: leave out create_graph=True")
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if one is None else one for one in ctx.numbers]


class Again:
    """A tensor rounded again in a backward, for all who need it there: layers, then the quantiser."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None

    def keep(self, function: Callable[..., Tensor], *operands: Any) -> Tensor:
        """`function(*operands)`, kept until the quantiser's backward, which follows that of its readers."""
        if self._tensor is None:
            self._tensor = function(*operands)
        return self._tensor

    def take(self, function: Callable[..., Tensor], *operands: Any) -> Tensor:
        """The same, and kept no longer."""
        found = self.keep(function, *operands)
        self.drop()
        return found

    def drop(self) -> None:
        """Forget it."""
        self._tensor = None


@dataclass(frozen=True)
class Rounding:
    """What it takes to round again: `function(*operands)`, the operands tensors or numbers."""

    function: Callable[..., Tensor]
    operands: tuple[Any, ...]
    again: Again


def with_note(output: Tensor, rounding: Rounding) -> Tensor:
    """The rounded tensor, with a note of how it came about for the layers that read it as it is."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        operands = (one.detach() if isinstance(one, Tensor) else one for one in rounding.operands)
        setattr(output, _NOTE, (replace(rounding, operands=tuple(operands)), output._version))
    return output


class _RoundedLayer(torch.autograd.Function):
    """A layer on a rounded input; what it keeps of the input is the tensor before rounding."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, rounding: Rounding
    ) -> Tensor:
        save_operands(ctx, weight, *rounding.operands)
        ctx.again, ctx.function, ctx.geometry = rounding.again, rounding.function, geometry
        ctx.bias_shape = None if bias is None else bias.shape
        return geometry.apply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, *operands = saved_operands(ctx)
        x = ctx.again.keep(ctx.function, *operands).to(weight.dtype)
        found = ctx.geometry.gradients(gradients[0], x, weight, ctx.bias_shape, ctx.needs_input_grad[:3])
        return *found, None, None


def apply_layer(geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer, keeping as little as it can for its backward."""
    note = None if torch.compiler.is_compiling() else getattr(x, _NOTE, None)
    if note is None or not geometry.has_gradients or note[1] != x._version:
        return geometry.apply(x, weight, bias)
    rounding: Rounding = note[0]
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return _RoundedLayer.apply(x, weight, bias, geometry, rounding)
