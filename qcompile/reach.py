"""Outputs that depend on parameters which did not enter them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Reach(torch.autograd.Function):
    """The tensor, with a gradient of 0 for every parameter."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0], *(torch.zeros_like(one) for one in ctx.saved_tensors)


def reaching(outputs: Sequence[Any], parameters: Sequence[Tensor]) -> tuple[Any, ...]:
    """The outputs, the first that has a gradient made to depend on all parameters, with a gradient of 0.

    A scheme with branches trains other parameters in every mode. Under `DistributedDataParallel` the last
    mode's backward reduces what all modes have accumulated, but only of parameters that its graph reaches.
    """
    found = list(outputs)
    for place, one in enumerate(found):
        if isinstance(one, Tensor) and one.requires_grad:
            found[place] = _Reach.apply(one, *parameters)
            break
    return tuple(found)
