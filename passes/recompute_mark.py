"""Let gradient checkpointing notice a recomputation at another mode.

torch compares the shapes of what a recomputation saves with those of the forward, and refuses differences.
All modes have the same shapes, so a wrong one would go unnoticed: an empty tensor is saved whose shape tells
the mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile.modes import ActiveMode


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mark: Tensor) -> Tensor:
        ctx.save_for_backward(mark)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        assert ctx.saved_tensors  # reading them is what makes checkpointing recompute and compare
        return gradients[0], None


def marked(x: Tensor, active: ActiveMode) -> Tensor:
    """A view of `x` whose backward saves a tensor of shape (mark, 0); not in compiled code."""
    if torch.compiler.is_compiling() or not x.requires_grad:
        return x
    return _Mark.apply(x, x.new_empty(active.mark, 0))
