"""Gradient checkpointing: a recomputation runs at the mode of the first pass, and counts no batch twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import nn

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
