"""Gradient checkpointing: a recomputation runs at the mode of the first pass, and counts no batch twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .modes import ActiveMode
from .passes.batchnorm import ModeBatchNorm

if TYPE_CHECKING:
    from .model import QuantModel


def recomputation(
    model: nn.Module,
) -> Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]:
    """`context_fn` for `torch.utils.checkpoint.checkpoint` around a prepared model.

    The recomputation runs at the mode that was active in the forward, and leaves running statistics of batch
    normalisation alone. Without it, a recomputation at another mode stops with torch's CheckpointError.

    Args:
        model: from `qcompile.prepare`, or a wrapper around one.

    Raises:
        InvalidInputType: if the model was not prepared.
    """
    from .wrappers import as_prepared

    prepared = as_prepared(model)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _again(prepared, prepared.active, prepared.active_rows)

    return contexts


@contextmanager
def _again(model: QuantModel, precision: Any, rows: ActiveMode) -> Iterator[None]:
    norms = [one for one in model.modules() if isinstance(one, ModeBatchNorm)]
    with model.activated(precision, rows):
        for norm in norms:
            norm.counts_batches = False
        try:
            yield
        finally:
            for norm in norms:
                norm.counts_batches = True


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mark: Tensor) -> Tensor:
        ctx.save_for_backward(mark)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # reading it is what makes checkpointing compare
        return gradients[0].view_as(gradients[0]) if ctx.saved_tensors else gradients[0], None


def marked(outputs: Any, active: ActiveMode) -> Any:
    """Flat outputs, the first with a saved tensor whose shape tells the mode.

    torch compares the shapes of what a recomputation saves with those of the forward. All modes have the same
    shapes, so a recomputation at the wrong one would go unnoticed without this.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return outputs
    place = next((n for n, one in enumerate(outputs) if isinstance(one, Tensor) and one.requires_grad), None)
    if place is None:
        return outputs
    number = active.row if active.policy is None else 100 + hash(active.policy) % 10**6
    mark = outputs[place].new_empty(number, 0)
    return (*outputs[:place], _Mark.apply(outputs[place], mark), *outputs[place + 1 :])
