"""Write every aten call in one way: positional arguments, trailing defaults dropped, lists instead of
tuples."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from qcompile.passes.aten import arguments_of, is_aten
from qcompile.passes.manager import Condition, Pass, PassResult


def _unwritten(graph_module: fx.GraphModule) -> str | None:
    for node in graph_module.graph.nodes:
        if is_aten(node) and _canonical(node) != (node.args, node.kwargs):
            return f"node '{node.name}' has other arguments"
    return None


class NormaliseArguments(Pass):
    """Arguments positional, trailing defaults dropped, so equal calls look equal.

    Sizes that hold for several dimensions are written once per dimension, and the stride of a pool is
    explicit.

    Keyword-only arguments stay keywords, without those equal to their default.
    """

    ensures = (Condition("has one way to write each call", _unwritten),)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        for node in graph_module.graph.nodes:
            if is_aten(node):
                args, kwargs = _canonical(node)
                if (args, kwargs) != (node.args, node.kwargs):
                    node.args, node.kwargs = args, kwargs
                    modified = True
        return PassResult(graph_module, modified)


def _canonical(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    assert isinstance(node.target, OpOverload)
    bound = arguments_of(node)
    if "kernel_size" in bound and bound.get("stride") == []:
        bound["stride"] = bound["kernel_size"]
    if node.target is torch.ops.aten.pad.default and bound["mode"] == "constant" and bound["value"] == 0:
        bound["value"] = None
    if bound.get("dropout") == 0.0 and "train" in bound:  # a recurrent layer whose mode says nothing
        bound["train"] = True
    positional: list[Any] = []
    needed = 0
    kwargs: dict[str, Any] = {}
    for argument in node.target._schema.arguments:
        value = bound[argument.name]
        if isinstance(value, (list, tuple)):
            value = list(value)
        per_dimension = getattr(argument, "N", None)  # the 2 of "int[2] stride"
        if per_dimension and type(value) is int:
            value = [value]
        if per_dimension and isinstance(value, list) and len(value) == 1:
            value = value * per_dimension
        is_default = argument.has_default_value() and _same(value, argument.default_value)
        if argument.kwarg_only:
            if not is_default and not (argument.name == "pin_memory" and value is False):
                kwargs[argument.name] = value
        else:
            positional.append(value)
            if not is_default:
                needed = len(positional)
    return tuple(positional[:needed]), kwargs


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, fx.Node) or isinstance(default, fx.Node):
        return value is default
    if isinstance(value, list) and any(isinstance(item, fx.Node) for item in value):
        return False
    if isinstance(value, bool) != isinstance(default, bool):
        return False
    if isinstance(default, int) and isinstance(value, list) and value:
        return all(item == default for item in value)
    if isinstance(default, list) and isinstance(value, list) and len(default) == 1:
        return all(item == default[0] for item in value)
    return not isinstance(value, (torch.dtype, torch.device)) and bool(value == default)
