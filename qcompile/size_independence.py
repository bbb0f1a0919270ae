"""Whether the integer graph of a mode holds for every size that the model leaves open.

Conversion is told concrete sizes, and some numbers depend on them: what a mean divides by, windows of
adaptive pooling, bounds of products. A mode is therefore converted again for much larger sizes; the graph
holds for all if not one node or constant differs.
"""

from __future__ import annotations

from collections.abc import Sequence

from .errors import FoldError, InvalidArgument
from .model import QuantModel
from .modes import Mode
from .passes.integer_model import IntegerModel
from .policy import Policy

#: Sizes to convert for are at least this, so that strides and windows leave more than one element.
LARGE = 1024


def holds_for_every_size(
    model: QuantModel, mode: Mode | Policy, graph: IntegerModel, shapes: Sequence[Sequence[int]]
) -> bool:
    """Whether a graph that was converted for some shapes is that of all sizes.

    Args:
        model: the prepared model.
        mode: the graph's.
        graph: as converted.
        shapes: of the inputs, for which it was converted.
    """
    from .verify.structure import graph_differences

    larger = _larger(model, shapes)
    if larger is None:
        return False
    try:
        return not graph_differences(graph, model.converted(mode, larger))
    except (InvalidArgument, FoldError):
        return False  # the model does not run on sizes that we know nothing of


def _larger(model: QuantModel, shapes: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...] | None:
    """All open sizes times one factor, so that whatever divided them still does."""
    opened = [
        (shape[one.dim], one)
        for given, shape in zip(model.signature.inputs, shapes, strict=True)
        for one in given.open
        if one.dim > 0
    ]
    if not opened:
        return None
    factor = max(-(-LARGE // size) for size, _ in opened)
    factor = min([max(factor, 8), *(one.largest // size for size, one in opened if one.largest is not None)])
    if factor < 2:
        return None
    return tuple(
        tuple(
            size * factor if dim in {one.dim for one in given.open if one.dim > 0} else size
            for dim, size in enumerate(shape)
        )
        for given, shape in zip(model.signature.inputs, shapes, strict=True)
    )
