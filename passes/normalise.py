"""The canonical form: which passes a freshly captured graph goes through, in order."""

from __future__ import annotations

from torch import fx, nn

from qcompile.passes.manager import Pass, PassManager
from qcompile.passes.normalise_arguments import NormaliseArguments
from qcompile.passes.normalise_dropout import LiftDropout
from qcompile.passes.normalise_inplace import RemoveInPlace
from qcompile.passes.normalise_layers import LiftLayers
from qcompile.passes.normalise_no_ops import RemoveNoOps, RemoveUnused
from qcompile.passes.normalise_stochastic_depth import LiftStochasticDepth


def normalise(graph_module: fx.GraphModule, model: nn.Module, training: bool) -> fx.GraphModule:
    """Bring a captured graph into the canonical form.

    Args:
        graph_module: calls on aten; parameters and buffers as get_attr; `meta["module_path"]` names the user's
            module whose forward made a node.
        model: the (copied) user's model.
        training: whether the graph was traced in training mode.

    Returns:
        The same graph module, functional, with weighted layers, norms, dropout and stochastic depth as modules.

    Raises:
        CaptureError: for in-place writes that other views see.
    """
    passes: list[Pass] = [NormaliseArguments(), RemoveInPlace(), NormaliseArguments(), RemoveNoOps()]
    if training:
        passes += [LiftStochasticDepth(model), LiftDropout(model)]
    passes += [LiftLayers(model, training), RemoveUnused()]
    return PassManager(passes)(graph_module).graph_module
