"""The training graph run piece by piece, each piece recomputed in its backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from .modes import ActiveMode
from .passes.batchnorm import ModeBatchNorm

if TYPE_CHECKING:
    from .model import QuantModel


@contextmanager
def batches_counted_already(model: nn.Module) -> Iterator[None]:
    """Batch normalisation leaves its running statistics alone in this block."""
    norms = [one for one in model.modules() if isinstance(one, ModeBatchNorm)]
    for norm in norms:
        norm.counts_batches = False
    try:
        yield
    finally:
        for norm in norms:
            norm.counts_batches = True


def run_segments(model: QuantModel, inputs: Sequence[Any], active: ActiveMode) -> tuple[Any, ...]:
    """The training graph on flat inputs, piece by piece, each recomputed in its backward."""
    graph = model.row_graphs[active.row]
    placeholders = [node.name for node in graph.nodes if node.op == "placeholder"]
    values: dict[str, Any] = dict(zip(placeholders, (*inputs, active), strict=True))
    for segment in model.checkpoint_pieces[active.row]:
        found = checkpoint(
            segment.function,
            model._users,
            *(values[name] for name in segment.inputs),
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), batches_counted_already(model)),
        )
        values.update(zip(segment.outputs, found, strict=True))
    return fx.node.map_arg(graph.output_node().args[0], lambda node: values[node.name])
