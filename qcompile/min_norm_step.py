"""One training step whose gradient is the min-norm combination of the modes' gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InvalidArgument
from .min_norm import min_norm_weights
from .own_parameters import own_parameters
from .prepared import Prepared
from .ranks import average_over_ranks, is_sharded


def backward_min_norm(
    model: Prepared, losses: Iterator[tuple[int, Tensor]], reduces_itself: bool
) -> tuple[Tensor, list[float]]:
    """Own parameters get their mode's gradient; shared ones the min-norm combination.

    Vertical layering, Eq. 10. Under several ranks every mode's gradient is averaged first, so that all solve
    the same problem.

    Args:
        model: in training mode.
        losses: row and loss of every mode, each needed before the next is computed.
        reduces_itself: the caller averages gradients over the ranks.

    Returns:
        The weighted sum of the losses, shape (), detached, and the weights by row.

    Raises:
        InvalidArgument: if parameters are sharded over ranks.
    """
    if is_sharded(model):
        raise InvalidArgument(
            "moo='mgd' needs whole gradients of every mode, which fully_shard does not keep"
        )
    own = {id(parameter) for parameter in own_parameters(model)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    shared = [parameter for parameter in trained if id(parameter) not in own]
    mine = [parameter for parameter in trained if id(parameter) in own]
    gradients: dict[int, list[Tensor]] = {}
    values: dict[int, Tensor] = {}
    for row, loss in losses:
        with torch.autocast(loss.device.type, enabled=False):
            found = torch.autograd.grad(loss, shared + mine, allow_unused=True, materialize_grads=True)
        reduced = list(found) if reduces_itself else average_over_ranks(found)
        gradients[row], values[row] = reduced[: len(shared)], loss.detach()
        _accumulate(mine, reduced[len(shared) :], 1.0)
    count = len(values)
    alpha = [1.0 / count] * count
    if shared:
        flat = [torch.cat([g.reshape(-1) for g in gradients[row]]).double() for row in range(count)]
        stacked = torch.stack(flat)
        alpha = min_norm_weights(stacked @ stacked.T).tolist()
    for row in range(count):
        _accumulate(shared, gradients[row], alpha[row])
    return torch.stack([values[row] * alpha[row] for row in range(count)]).sum(), alpha


def _accumulate(parameters: list[nn.Parameter], gradients: Any, factor: float) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        scaled = gradient * factor
        parameter.grad = scaled if parameter.grad is None else parameter.grad + scaled
