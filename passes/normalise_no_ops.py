"""Drop what computes nothing: identities, assertions, dropout that is switched off, values nobody uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from qcompile.passes.aten import arguments_of, is_aten, is_whole_slice
from qcompile.passes.manager import Condition, Pass, PassResult
from qcompile.passes.normalise_inplace import FUNCTIONAL

_aten = torch.ops.aten

_ALWAYS = (
    _aten.alias.default,
    _aten.lift_fresh.default,
    _aten.lift_fresh_copy.default,
)


def _switched_off(arguments: dict[str, Any]) -> bool:
    return arguments["train"] is False


def _on_constant(arguments: dict[str, Any]) -> bool:
    return isinstance(arguments["self"], fx.Node) and arguments["self"].op == "get_attr"


_IDENTITY_IF: dict[Any, Callable[[dict[str, Any]], bool]] = {
    **{target: (lambda arguments: True) for target in _ALWAYS},
    _aten.detach.default: _on_constant,
    _aten.dropout.default: _switched_off,
    _aten.feature_dropout.default: _switched_off,
    _aten.alpha_dropout.default: _switched_off,
    _aten.feature_alpha_dropout.default: _switched_off,
    _aten.slice.Tensor: is_whole_slice,
}


_MOVES = (_aten.to.device, _aten.to.dtype_layout)


class RemoveMemoryLayout(Pass):
    """Copies that only arrange memory (`clone`, `contiguous`) are bypassed, and `view` becomes `reshape`.

    The same function once nothing writes in place, hence the requirement; a `view` would fail on memory that
    the user's `contiguous()` no longer arranges.
    """

    requires = (FUNCTIONAL,)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        for node in list(graph_module.graph.nodes):
            if not is_aten(node):
                continue
            if node.target in (_aten.clone.default, _aten.contiguous.default):
                node.replace_all_uses_with(node.args[0])
                graph_module.graph.erase_node(node)
                modified = True
            elif node.target in (_aten.view.default, _aten._unsafe_view.default):
                node.target = _aten.reshape.default
                modified = True
        return PassResult(graph_module, modified)


class RemoveNoOps(Pass):
    """Identities are bypassed: dropout that is switched off, slices of everything, detached constants.

    Moves to a device go, too: a graph runs where its parameters and inputs are.
    """

    requires = (FUNCTIONAL,)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        for node in list(graph_module.graph.nodes):
            is_identity = _IDENTITY_IF.get(node.target) if is_aten(node) else None
            if is_identity is not None and is_identity(arguments_of(node)):
                node.replace_all_uses_with(node.args[0])
                graph_module.graph.erase_node(node)
                modified = True
            elif is_aten(node) and node.target in _MOVES:
                dtype = arguments_of(node)["dtype"]
                if dtype is None:
                    node.replace_all_uses_with(node.args[0])
                    graph_module.graph.erase_node(node)
                else:
                    node.target, node.args, node.kwargs = _aten.to.dtype, (node.args[0], dtype), {}
                modified = True
        return PassResult(graph_module, modified)


def _first_unused(graph_module: fx.GraphModule) -> str | None:
    for node in graph_module.graph.nodes:
        if node.op not in ("placeholder", "output") and not node.users:
            return f"'{node.name}' is not used"
    return None


class RemoveUnused(Pass):
    """Values that nobody uses go, random numbers and assertions included."""

    ensures = (Condition("uses every value", _first_unused),)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        for node in reversed(list(graph_module.graph.nodes)):
            if node.op not in ("placeholder", "output") and not node.users:
                graph_module.graph.erase_node(node)
                modified = True
        return PassResult(graph_module, modified)
