"""The graph input that tells modules which mode runs.

Modes are an explicit argument of the graph, not state of its modules: threads, recomputation and compiled
graphs then see the mode that they were called with.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

MODE_INPUT = "active_mode"


class ModeModule(nn.Module):
    """Base of modules that depend on the mode; they are called with an `ActiveMode` as last argument.

    Attributes:
        slot: this module's place among the rows of a policy.
        layers: module paths of the quantised layers whose modes decide this module's: a layer itself, the
            readers of a quantiser's output, the layer before a batch normalisation.
        group: which of the optimiser's groups its parameters belong to, see `qcompile.param_groups`.
        is_added: whether the float model has nothing in its place, so that no entry of its state dict is the
            module's.
    """

    slot: int = 0
    layers: tuple[str, ...] = ()
    group: str = "weights"
    is_added: bool = False

    def own_parameters(self) -> list[nn.Parameter]:
        """Parameters whose rows belong to one mode each."""
        return []

    def overwrite(self, *args: Any) -> Any:
        """As a call in evaluation mode; the result may stand where the first argument stood."""
        return self(*args)

    def forget(self) -> None:
        """Go back to the state after `prepare`; called when float weights are loaded."""


#: An integer for a uniform mode, a (1,) int64 tensor for a policy.
Row: TypeAlias = "int | Tensor"


def picked(values: Tensor, row: Row) -> Tensor:
    """One row of stacked values (rows, ...): a view for an integer, a gathered copy for a (1,) tensor."""
    return values[row] if isinstance(row, int) else values.index_select(0, row).squeeze(0)


def store(values: Tensor, row: Row, value: Tensor) -> None:
    """Write one row of stacked values."""
    if not torch.compiler.is_compiling():
        values = (
            values.data
        )  # graphs of other modes may hold theirs: a write that autograd counts spoils those
    if isinstance(row, int):
        values[row].copy_(value)
    else:
        values.index_copy_(0, row, value.unsqueeze(0))


def mode_placeholder(graph: fx.Graph) -> fx.Node:
    """The placeholder that carries the `ActiveMode`, appended after the user's inputs if it is not there."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        if node.meta.get(MODE_INPUT):
            return node
    with graph.inserting_after(placeholders[-1]):
        node = graph.placeholder(MODE_INPUT)
    node.meta[MODE_INPUT] = True
    return node
