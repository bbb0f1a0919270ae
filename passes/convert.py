"""Convert one mode of a trained graph to integers.

An abstract interpretation of the training graph: every tensor is either float or an affine map of integer
tensors (`fold.Affine`). Operators that are affine or monotone extend the map; the next quantiser turns it
into one epilogue. A tensor that something else must read becomes a high-precision integer first, and
whatever is neither (a softmax, a gate) becomes a float island.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

from torch import Tensor, fx, nn

from qcompile.errors import FoldError
from qcompile.modes import Mode
from qcompile.policy import Policy

from .aten import PRODUCTS, aten_name
from .convert_emit import Emitter, Value
from .convert_modules import convert_module
from .convert_rules import RULES
from .eval_identities import IDENTITIES_IN_EVAL
from .fake_run import FakeRun
from .fold import Affine
from .integer_model import IntegerModel
from .mode_input import MODE_INPUT, ModeModule
from .quantizers import ActivationQuantizer


def convert_graph(
    model: nn.Module,
    graph: fx.Graph,
    mode: Mode | Policy,
    row_of: Callable[[ModeModule], int],
    statistics: Tensor | None,
    shapes: Sequence[Sequence[int]],
) -> IntegerModel:
    """Fold and convert one mode, or one policy.

    Args:
        model: owner of the modules that the graph calls.
        graph: the training graph.
        mode: the mode or policy.
        row_of: the row of each module that depends on the mode.
        statistics: a policy's own of batch normalisation, see `ActiveMode`; None for those of each row.
        shapes: shapes of the graph's inputs; dimension 0, the batch, stays open in the result.

    Returns:
        The integer graph.

    Raises:
        FoldError: if activation steps were never set, or values exceed the contract's integers.
    """
    for path in dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "call_module"):
        module = model.get_submodule(path)
        if isinstance(module, ActivationQuantizer) and not bool(module.initialised[row_of(module)]):
            raise FoldError(
                f"layer {path!r}: its activation step for mode {mode.label} was never set; "
                "train a step or run qcompile.calibrate(model, batches) first"
            )
    traced = FakeRun(fx.GraphModule(model, graph)).trace(shapes)
    emitter = Emitter(model, row_of, statistics, traced, lambda node: _keeps_integers(model, node))
    values: dict[fx.Node, Value] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            if not node.meta.get(MODE_INPUT):
                values[node] = emitter.placeholder(node)
        elif node.op == "output":
            emitter.output(node, values)
        else:
            values[node] = _convert_node(emitter, node, values)
    return IntegerModel(emitter.constants, emitter.finish(), mode)


def _convert_node(emitter: Emitter, node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    if node.op == "get_attr":
        return emitter.float_attribute(node)
    if node.op == "call_module":
        module = emitter.model.get_submodule(str(node.target))
        return convert_module(emitter, node, module, values)
    source = node.args[0] if node.args else None
    if node.target is operator.getitem and isinstance(source, fx.Node):
        container = values[source]
        if isinstance(container, Affine):
            return emitter.picked(node, container)
    rule = RULES.get(aten_name(node))
    if rule is not None and any(isinstance(values.get(n), Affine) for n in node.all_input_nodes):
        converted = rule(emitter, node, values)
        if converted is not None:
            return converted
    return emitter.island(node, values)


def _keeps_integers(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), (ModeModule, *IDENTITIES_IN_EVAL))
    name = aten_name(node)
    products = name in ("mul", "div", *PRODUCTS) and len(node.all_input_nodes) > 1
    return node.target is operator.getitem or (name in RULES and not products)
