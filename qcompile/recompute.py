"""Gradient checkpointing: a recomputation runs at the mode of the first pass, and counts no batch twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from .errors import InvalidArgument
from .modes import ActiveMode
from .passes.batchnorm import ModeBatchNorm
from .passes.segments import cut

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
    with model.activated(precision, rows), _batches_counted_already(model):
        yield


@contextmanager
def _batches_counted_already(model: nn.Module) -> Iterator[None]:
    norms = [one for one in model.modules() if isinstance(one, ModeBatchNorm)]
    for norm in norms:
        norm.counts_batches = False
    try:
        yield
    finally:
        for norm in norms:
            norm.counts_batches = True


def checkpoint_segments(model: nn.Module, segments: int) -> nn.Module:
    """Trade time for memory: training keeps what crosses between pieces of the graph and recomputes the rest.

    For eager training; `torch.compile` decides by itself what to recompute.

    Args:
        model: from `qcompile.prepare`, or a wrapper around one; changed in place.
        segments: number of pieces; about the square root of the number of layers needs the least memory, 1
            turns recomputation off.

    Returns:
        The model.

    Raises:
        InvalidArgument: if `segments` is no positive whole number.
        InvalidInputType: if the model was not prepared.
    """
    from .wrappers import as_prepared

    prepared = as_prepared(model)
    if isinstance(segments, bool) or not isinstance(segments, int) or segments < 1:
        raise InvalidArgument(f"segments must be a whole number from 1 on, not {segments!r}")
    prepared.checkpoint_pieces = cut(prepared.graph, segments) if segments > 1 else ()
    return model


def run_segments(model: QuantModel, inputs: Sequence[Any], active: ActiveMode) -> tuple[Any, ...]:
    """The training graph on flat inputs, piece by piece, each recomputed in its backward."""
    placeholders = [node.name for node in model.graph.nodes if node.op == "placeholder"]
    values: dict[str, Any] = dict(zip(placeholders, (*inputs, active), strict=True))
    for segment in model.checkpoint_pieces:
        found = checkpoint(
            segment.function,
            model._users,
            *(values[name] for name in segment.inputs),
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), _batches_counted_already(model)),
        )
        values.update(zip(segment.outputs, found, strict=True))
    return fx.node.map_arg(model.graph.output_node().args[0], lambda node: values[node.name])
