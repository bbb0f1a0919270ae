"""Gradients of clipped rounding with kernels that eager CPU code has ready: few passes over the tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def has_kernels(x: Tensor) -> bool:
    """Whether the functions of this module take the tensor, outside of compilers."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def within(gradient: Tensor, x: Tensor, bottom: float, top: float) -> Tensor:
    """The gradient where bottom <= x <= top, else 0."""
    # the kernel passes gradients strictly between its bounds; the range includes its ends
    smallest, relative = torch.finfo(x.dtype).tiny, torch.finfo(x.dtype).eps
    bottom -= max(abs(bottom) * relative, smallest)
    top += max(abs(top) * relative, smallest)
    found: Tensor = torch.ops.aten.hardtanh_backward(gradient, x, bottom, top)
    return found


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of the products of two tensors of one shape, shape ()."""
    if a.stride() == b.stride() and a.is_contiguous(memory_format=torch.channels_last) and a.dim() == 4:
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    if a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.view(-1), b.view(-1))
    return (a * b).sum()
