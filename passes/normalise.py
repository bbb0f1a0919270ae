"""The canonical form: which passes a freshly captured graph goes through, in order."""

from __future__ import annotations

from torch import fx, nn

from qcompile.passes.manager import Pass, PassManager
from qcompile.passes.normalise_aliases import NormaliseAliases
from qcompile.passes.normalise_arguments import NormaliseArguments
from qcompile.passes.normalise_attention import LiftAttention
from qcompile.passes.normalise_cells import CellsAsLinear
from qcompile.passes.normalise_computed import LiftComputedLayers, MatricesAsLinear
from qcompile.passes.normalise_dropout import LiftDropout
from qcompile.passes.normalise_einsum import EinsumAsLinear
from qcompile.passes.normalise_inplace import RemoveInPlace
from qcompile.passes.normalise_layers import LiftLayers
from qcompile.passes.normalise_no_ops import RemoveMemoryLayout, RemoveNoOps, RemoveUnused
from qcompile.passes.normalise_stochastic_depth import LiftStochasticDepth


def normalise_training(graph_module: fx.GraphModule, model: nn.Module) -> fx.GraphModule:
    """Bring a graph that was traced in training mode into the canonical form.

    Args:
        graph_module: calls on aten; parameters and buffers as get_attr; `meta["module_path"]` names the
            user's module whose forward made a node.
        model: the (copied) user's model.

    Returns:
        The same graph module, functional, with weighted layers, norms, dropout and stochastic depth as
        modules.

    Raises:
        CaptureError: for writes in place that other views see, or into parameters and buffers.
    """
    passes = [
        *_FUNCTIONAL,
        LiftStochasticDepth(model),
        LiftDropout(model),
        LiftAttention(model),
        LiftLayers(model, True),
        LiftComputedLayers(model, True),
        RemoveUnused(),
    ]
    return PassManager(passes)(graph_module).graph_module


def normalise_evaluation(
    graph_module: fx.GraphModule, model: nn.Module, training: fx.GraphModule | None = None
) -> fx.GraphModule:
    """Bring a graph that was traced in evaluation mode into the canonical form.

    Dropout and stochastic depth are gone. To compare with a training graph, the same layers are modules as
    there: a norm that is frozen in training stays a call in both.

    Args:
        graph_module: as for `normalise_training`.
        model: the (copied) user's model.
        training: the canonical graph of training mode, if there is one.
    """
    modules = None
    if training is not None:
        modules = {str(node.target) for node in training.graph.nodes if node.op == "call_module"}
    passes = [
        *_FUNCTIONAL,
        LiftStochasticDepth(model),
        LiftLayers(model, False, modules),
        LiftComputedLayers(model, False),
        RemoveUnused(),
    ]
    return PassManager(passes)(graph_module).graph_module


_FUNCTIONAL: tuple[Pass, ...] = (
    NormaliseAliases(),
    NormaliseArguments(),
    RemoveInPlace(),
    NormaliseArguments(),
    RemoveMemoryLayout(),
    RemoveNoOps(),
    CellsAsLinear(),
    EinsumAsLinear(),
    MatricesAsLinear(),
)
