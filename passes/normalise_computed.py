"""Multiplications by parameters that no layer of torch.nn stands for become layers, too."""

from __future__ import annotations

import torch
from torch import fx, nn

from qcompile.passes.aten import arguments_of, is_aten
from qcompile.passes.computed_weights import ComputedWeights, WeightProgram
from qcompile.passes.first_last import TRANSPOSED, WEIGHTED
from qcompile.passes.layer_from_node import Origin, computed_layer_of
from qcompile.passes.manager import Pass, PassResult
from qcompile.passes.module_tree import module_at, place_module
from qcompile.passes.normalise_inplace import FUNCTIONAL
from qcompile.passes.normalise_layers import replace_call
from qcompile.passes.static_tensors import StaticTensors

_aten = torch.ops.aten


class MatricesAsLinear(Pass):
    """`x @ W` and `addmm(b, x, W)` with a matrix of parameters become `linear(x, W^T, b)`."""

    requires = (FUNCTIONAL,)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite in place."""
        static, modified = StaticTensors(graph_module), False
        for node in list(graph_module.graph.nodes):
            found = _product(node) if is_aten(node) else None
            if found is None:
                continue
            x, matrix, bias = found
            value = static(matrix)
            known_bias = None if bias is None else static(bias)
            if value is None or value.dim() != 2 or not value.is_floating_point() or static(x) is not None:
                continue
            if bias is not None and (known_bias is None or known_bias.shape != value.shape[1:]):
                continue
            with graph_module.graph.inserting_before(node):
                weight = _transposed(graph_module.graph, matrix)
                weight.meta = {key: node.meta[key] for key in ("source", "module_path") if key in node.meta}
                rest = () if bias is None else (bias,)
                linear = graph_module.graph.call_function(_aten.linear.default, (x, weight, *rest))
            linear.meta = dict(node.meta)
            node.replace_all_uses_with(linear)
            graph_module.graph.erase_node(node)
            modified = True
        return PassResult(graph_module, modified)


def _product(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """Left factor, right factor and summand."""
    given = arguments_of(node)
    if node.target in (_aten.mm.default, _aten.matmul.default):
        left, right = list(given.values())[:2]
        return left, right, None
    if node.target is _aten.addmm.default and given["beta"] == 1 and given["alpha"] == 1:
        return given["mat1"], given["mat2"], given["self"]
    return None


def _transposed(graph: fx.Graph, matrix: fx.Node) -> fx.Node:
    turned = matrix.target in (_aten.t.default, _aten.numpy_T.default) or (
        matrix.target is _aten.transpose.int and {abs(matrix.args[1]), abs(matrix.args[2])} <= {0, 1, 2}
    )
    if turned and matrix.args[0].op == "get_attr":
        return matrix.args[0]
    return graph.call_function(_aten.t.default, (matrix,))


class LiftComputedLayers(Pass):
    """A convolution or linear call whose weight is computed from parameters becomes a module.

    Under the user's module that makes the call, by the operator's name: `encoder.proj.linear`. Equal calls
    become one module.

    Args:
        model: the (copied) user's model.
        training: whether the graph was traced in training mode.
    """

    requires = (FUNCTIONAL,)

    def __init__(self, model: nn.Module, training: bool) -> None:
        self._model = model
        self._training = training

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite in place."""
        static = StaticTensors(graph_module)
        paths: dict[object, str] = {}
        for node in list(graph_module.graph.nodes):
            if not is_aten(node):
                continue
            inner = node.meta.get("module_path", "")
            layer = computed_layer_of(node, Origin(static, module_at(self._model, inner), self._training))
            if layer is None or not issubclass(layer.kind, WEIGHTED) or issubclass(layer.kind, TRANSPOSED):
                continue  # transposed ones are multiplied in float, by tensors like any other
            tensors = dict(layer.tensors)
            used = [one for one in tensors.values() if one is not None]
            x = arguments_of(node)[layer.input]
            if any(static(one) is None for one in used) or static(x) is not None:
                continue
            key = layer.kind, layer.settings, *(static.formula(one) for one in tensors.values())
            if key not in paths:
                graph, sources = static.program((tensors["weight"], tensors["bias"]))
                program = WeightProgram(graph_module, graph, sources)
                module = layer.build()
                ComputedWeights.lend(module, program=program)
                name = str(node.target).split(".")[1]
                paths[key] = _free_path(graph_module, inner, name)
                place_module(graph_module, paths[key], module)
            replace_call(graph_module, node, paths[key], (x,))
        notes = tuple(f"{one}: its weight is computed" for one in paths.values())
        return PassResult(graph_module, bool(paths), notes)


def _free_path(graph_module: fx.GraphModule, owner_path: str, name: str) -> str:
    """A path below a module's that nothing has, parameters and buffers included."""
    owner, number, found = module_at(graph_module, owner_path), 0, name
    while owner is not None and hasattr(owner, found):
        number += 1
        found = f"{name}_{number}"
    return f"{owner_path}.{found}" if owner_path else found
