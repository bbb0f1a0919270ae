"""The shape arithmetic of weighted layers: one record that convolutions and linear layers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from qcompile.errors import InvalidArgument

_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


@dataclass(frozen=True)
class Geometry:
    """How a weight meets its input.

    Attributes:
        kind: `conv` for 1-D to 3-D convolutions (input N, C, *spatial), `linear` for (..., features).
        stride, dilation: one entry per spatial dimension; empty for linear.
        padding: (before, after) per spatial dimension, filled with the value 0.
        groups: channel groups.
    """

    kind: Literal["conv", "linear"]
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @staticmethod
    def of(module: nn.Module) -> Geometry:
        """Read the geometry of an `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` or `nn.Linear`.

        Raises:
            InvalidArgument: for any other module and for padding modes other than zeros.
        """
        if isinstance(module, nn.Linear):
            return Geometry("linear")
        if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            raise InvalidArgument(f"{type(module).__name__} is no convolution and no linear layer")
        if module.padding_mode != "zeros":
            raise InvalidArgument(f"padding_mode={module.padding_mode!r} must be an explicit pad node here")
        kernel, dilation = tuple(module.kernel_size), tuple(module.dilation)
        if module.padding == "valid":
            padding = tuple((0, 0) for _ in kernel)
        elif module.padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            padding = tuple((t // 2, t - t // 2) for t in total)
        else:
            padding = tuple((int(p), int(p)) for p in module.padding)
        return Geometry("conv", tuple(module.stride), padding, dilation, module.groups)

    @property
    def flat_padding(self) -> list[int]:
        """(before, after) pairs in one list, first spatial dimension first."""
        return [amount for pair in self.padding for amount in pair]

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Run the layer in the dtype of its operands."""
        if self.kind == "linear":
            return functional.linear(x, weight, bias)
        padding: tuple[int, ...] = tuple(before for before, _ in self.padding)
        if any(before != after for before, after in self.padding):
            # torch pads symmetrically only; its pad function wants the last dimension first
            x = functional.pad(x, [amount for pair in reversed(self.padding) for amount in pair])
            padding = (0,) * len(self.padding)
        convolution = _CONVOLUTIONS[len(self.stride)]
        return convolution(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    @property
    def has_gradients(self) -> bool:
        """Whether `gradients` is there: not where padding differs between the ends, which takes two calls."""
        return all(before == after for before, after in self.padding)

    def gradients(
        self, upstream: Tensor, x: Tensor, weight: Tensor, bias_shape: Any, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The backward of `apply`.

        Args:
            upstream: gradient of the output.
            x, weight: the operands.
            bias_shape: shape of the bias, None without one.
            wanted: which of the gradients of x, weight and bias to compute.

        Returns:
            The three gradients; None where not wanted.
        """
        need_x, need_weight, need_bias = wanted[0], wanted[1], wanted[2] and bias_shape is not None
        if self.kind == "linear":
            rows = upstream.reshape(-1, upstream.shape[-1])  # of one vector, too
            return (
                upstream @ weight if need_x else None,
                rows.T @ x.reshape(-1, x.shape[-1]) if need_weight else None,
                rows.sum(0) if need_bias else None,
            )
        padding = [before for before, _ in self.padding]
        mask, none = [need_x, need_weight, need_bias], [0] * len(padding)
        sizes = None if bias_shape is None else list(bias_shape)
        found = torch.ops.aten.convolution_backward(
            upstream, x, weight, sizes, self.stride, padding, self.dilation, False, none, self.groups, mask
        )
        d_x, d_weight, d_bias = (one if want else None for one, want in zip(found, mask, strict=True))
        return d_x, d_weight, d_bias

    def window_sum(self, x: Tensor, weight_shape: torch.Size) -> Tensor:
        """Sum of the input over every output's receptive field, one value per channel group.

        Args:
            x: input of the layer.
            weight_shape: shape of the layer's weight.

        Returns:
            (N, groups, *spatial) for convolutions, (..., 1) for linear layers.
        """
        if self.kind == "linear":
            return x.sum(-1, keepdim=True)
        return self.apply(x, x.new_ones((self.groups, *weight_shape[1:])))
