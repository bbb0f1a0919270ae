"""Operators that torch has under several names are called by the one that everything else knows."""

from __future__ import annotations

import torch
from torch import fx

from qcompile.passes.aten import aten_name
from qcompile.passes.manager import Pass, PassResult

#: Other names: the arguments are the same, and so are the overloads where none is given.
_ALIASES = {
    "absolute": "abs",
    "arccos": "acos",
    "arccosh": "acosh",
    "arcsin": "asin",
    "arcsinh": "asinh",
    "arctan": "atan",
    "arctan2": "atan2",
    "arctanh": "atanh",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "true_divide": "div",
    "fix": "trunc",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "moveaxis": "movedim",
    "multiply": "mul",
    "negative": "neg",
    "not_equal": "ne",
    "row_stack": "vstack",
    "special_erf": "erf",
    "special_exp2": "exp2",
    "special_expit": "sigmoid",
    "special_expm1": "expm1",
    "special_log1p": "log1p",
    "special_logsumexp": "logsumexp",
    "subtract": "sub",
    "swapaxes": "transpose.int",
    "swapdims": "transpose.int",
}


class NormaliseAliases(Pass):
    """`multiply` becomes `mul`, `multiply_` becomes `mul_`, `mT` a transposition, and so on."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        notes = []
        for node in graph_module.graph.nodes:
            name = aten_name(node)
            plain = name.removesuffix("_")
            if plain in _ALIASES:
                wanted, _, overload = _ALIASES[plain].partition(".")
                packet = getattr(torch.ops.aten, wanted + name[len(plain) :])
                node.target = getattr(packet, overload or node.target._overloadname or "default")
                notes.append(f"{node.name}: {name} is {node.target}")
            elif name == "mT":
                node.target, node.args = torch.ops.aten.transpose.int, (*node.args, -2, -1)
                notes.append(f"{node.name}: mT is {node.target}")
        return PassResult(graph_module, bool(notes), notes=tuple(notes))
