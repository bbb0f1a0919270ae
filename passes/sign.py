"""Decide from the graph which tensors cannot be negative; those get unsigned activation codes."""

from __future__ import annotations

import operator

from torch import fx, nn

from .aten import AVERAGE, LAYOUT, MAX_POOL, arguments_of, aten_name

_NON_NEGATIVE = frozenset(
    ("relu", "relu6", "sigmoid", "hardsigmoid", "softmax", "_softmax", "abs", "exp", "square")
    + ("zeros", "ones", "zeros_like", "ones_like", "new_zeros", "new_ones")
)
#: Writes by the name of what they put into another tensor.
_WRITES = {"select_scatter": "src", "slice_scatter": "src", "index_put": "values", "index_copy": "source"}
_KEEPS_SIGN = (
    LAYOUT
    | MAX_POOL
    | AVERAGE
    | {"dropout", "cat", "stack", "add", "mul", "sum", "upsample_bilinear2d"}
    | {"max_pool2d_with_indices", "max_pool3d_with_indices", "max_unpool2d", "max_unpool3d"}
)
_SIGN_KEEPING_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class NonNegative:
    """Answers, for the nodes of one graph, whether a tensor is provably >= 0."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._graph_module = graph_module
        self._known: dict[fx.Node, bool] = {}

    def __call__(self, node: fx.Node) -> bool:
        """True if no element of the node's value can be negative."""
        # decided in graph order, so that deep networks need no deep recursion
        for one in self._graph_module.graph.nodes:
            if one not in self._known:
                self._known[one] = self._decide(one)
            if one is node:
                break
        return self._known[node]

    def _decide(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self._graph_module.get_submodule(str(node.target))
            keeps = isinstance(module, _SIGN_KEEPING_MODULES) or type(module).__name__ == "StochasticDepth"
            return keeps and self._known[node.all_input_nodes[0]]
        if node.target is operator.getitem:
            return self._known[node.all_input_nodes[0]]
        name = aten_name(node)
        if name in _NON_NEGATIVE:
            return True
        if name in ("hardtanh", "clamp", "clamp_min"):
            values = arguments_of(node)
            low, high = values.get("min_val", values.get("min")), values.get("max_val", values.get("max"))
            if isinstance(high, (int, float)) and high < 0:
                return False
            if isinstance(low, (int, float)) and low >= 0:
                return True
            return name != "hardtanh" and self._known.get(node.all_input_nodes[0], False)
        if name in ("pad", "constant_pad_nd") and (arguments_of(node).get("value") or 0) >= 0:
            return self._known[node.all_input_nodes[0]]
        if name in _WRITES:
            written = arguments_of(node)
            return self._known[written["self"]] and self._known[written[_WRITES[name]]]
        if name in _KEEPS_SIGN:
            factors = (*node.args, node.kwargs.get("alpha", 1)) if name in ("add", "mul") else ()
            scalars = [one for one in factors if isinstance(one, (int, float))]
            return all(self._known[one] for one in node.all_input_nodes) and all(one >= 0 for one in scalars)
        return False
