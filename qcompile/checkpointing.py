"""Gradient checkpointing: a recomputation runs at the mode of the first pass, and counts no batch twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

from .errors import InvalidArgument
from .modes import ActiveMode
from .passes.segments import cut
from .prepared import Prepared
from .recompute import batches_counted_already
from .wrappers import as_prepared


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
    prepared = as_prepared(model)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _again(prepared, prepared.active, prepared.active_rows)

    return contexts


@contextmanager
def _again(model: Prepared, precision: Any, rows: ActiveMode) -> Iterator[None]:
    with model.activated(precision, rows), batches_counted_already(model):
        yield


def checkpoint_segments(model: nn.Module, segments: int) -> nn.Module:
    """Trade time for memory: training keeps what crosses between pieces of the graph and recomputes the rest.

    For eager training; `torch.compile` decides by itself what to recompute. Of a model that was prepared in
    parts, every part is cut.

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
    prepared = as_prepared(model)
    if isinstance(segments, bool) or not isinstance(segments, int) or segments < 1:
        raise InvalidArgument(f"segments must be a whole number from 1 on, not {segments!r}")
    for part in prepared.parts.values():
        pieces = {id(graph): cut(graph, segments) for graph in part.row_graphs} if segments > 1 else {}
        part.checkpoint_pieces = tuple(pieces[id(graph)] for graph in part.row_graphs) if pieces else ()
    return model
