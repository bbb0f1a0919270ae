"""Torch functions, tensor methods and Python operators of a symbolic trace become calls on aten."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from qcompile.errors import CaptureError
from qcompile.passes.aten import is_aten
from qcompile.passes.fx_op_table import CALLS, OPERATORS, OVERLOADS, PLAIN_ATTRIBUTES, PLAIN_METHODS
from qcompile.passes.manager import Condition, Pass, PassResult
from qcompile.passes.normalise_fx_indexing import convert_assignment, convert_indexing
from qcompile.passes.source_lines import source_of

_aten = torch.ops.aten
_IN_PLACE_OPERATORS = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
                       operator.itruediv: operator.truediv}  # fmt: skip


def _first_unknown_write(graph_module: fx.GraphModule) -> str | None:
    for node in graph_module.graph.nodes:
        if (
            node.op == "call_method"
            and str(node.target).endswith("_")
            and not str(node.target).startswith("__")
        ):
            return f"'{node.name}' calls {node.target}"
    return None


class ConvertToAten(Pass):
    """What the table knows becomes aten; the rest stays as it is, except writes in place, which must be
    known."""

    ensures = (Condition("has no in-place method outside aten", _first_unknown_write),)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Raises: CaptureError for an in-place call that has no aten form in the table."""
        tensors: set[fx.Node] = set()
        for node in list(graph_module.graph.nodes):
            if node.target is operator.setitem:
                if not convert_assignment(graph_module.graph, node, tensors):
                    raise CaptureError(
                        f"{source_of(node)}: this assignment into a tensor cannot be followed without "
                        "examples; pass example_inputs"
                    )
                continue
            if not _is_tensor(node, tensors):
                if node.target in _IN_PLACE_OPERATORS:  # on a size, which has no memory to share
                    node.target = _IN_PLACE_OPERATORS[node.target]
                convert_indexing(graph_module.graph, node, tensors)
                continue
            tensors.add(node)
            call = _aten_call(node, tensors)
            if call is not None:
                _rewrite(node, *call)
            elif node.op == "call_function" and node.target is operator.getitem:
                result = convert_indexing(graph_module.graph, node, tensors)
                tensors.update(result)
            elif _writes(node):
                raise CaptureError(
                    f"{source_of(node)}: the in-place '{_name(node)}' is not known without examples; "
                    "pass example_inputs, or use the form without '_'"
                )
        return PassResult(graph_module, True)


def _is_tensor(node: fx.Node, tensors: set[fx.Node]) -> bool:
    """Whether a node is a tensor (or a list of tensors) rather than a size, a dtype or the like."""
    if node.op in ("placeholder", "get_attr", "call_module"):
        return True
    if node.op == "call_method":
        return node.target not in PLAIN_METHODS
    if node.op != "call_function" or node.target is _aten.sym_size.int:
        return False
    if node.target is getattr:
        return node.args[1] not in PLAIN_ATTRIBUTES
    if getattr(node.target, "__module__", None) in ("_operator", "math", "builtins"):
        return any(argument in tensors for argument in node.all_input_nodes)
    return True


def _name(node: fx.Node) -> str:
    return (
        str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
    )


def _writes(node: fx.Node) -> bool:
    if node.op == "call_function" and node.kwargs.get("inplace") is True:
        return True
    name = _name(node)
    return node.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__")


def _rewrite(node: fx.Node, target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    node.op = "call_function"
    node.target = target
    node.args = args
    node.kwargs = kwargs


def _aten_call(
    node: fx.Node, tensors: set[fx.Node]
) -> tuple[OpOverload, tuple[Any, ...], dict[str, Any]] | None:
    if node.op not in ("call_function", "call_method") or is_aten(node):
        return None
    if node.op == "call_function" and node.target in CALLS:
        try:
            found = CALLS[node.target](*node.args, **node.kwargs)
        except TypeError:  # a parameter of another torch version
            return None
        return None if found is None else (*found, {})
    args, kwargs = node.args, dict(node.kwargs)
    if node.op == "call_function" and node.target in OPERATORS:
        name = OPERATORS[node.target]
        if len(args) == 2 and args[0] not in tensors:
            if name == "div":
                return None
            name, args = ("rsub" if name == "sub" else name), args[::-1]
    elif node.op == "call_function" and not _is_torchs(node.target):
        return None
    else:
        name = _name(node)
    if kwargs.pop("inplace", False):
        name += "_"
    kwargs.pop("_stacklevel", None)
    for overload in OVERLOADS.get(name, ()):
        bound = _bind(overload, args, kwargs, tensors)
        if bound is not None:
            return overload, *bound
    return None


def _is_torchs(function: Any) -> bool:
    module = getattr(function, "__module__", None) or ""
    return module.split(".")[0] == "torch" or inspect.isbuiltin(function)


def _bind(
    overload: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], tensors: set[fx.Node]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments by the schema of an overload, or None if they do not fit it."""
    arguments = overload._schema.arguments
    positional = [argument for argument in arguments if not argument.kwarg_only]
    values = list(args)
    rest = dict(kwargs)
    if "input" in rest and not any(argument.name == "input" for argument in arguments):
        rest["self"] = rest.pop("input")
    taken: list[Any] = []
    for argument in positional:
        kind = str(argument.type)
        if values:
            # x.view(2, 3) spells x.view([2, 3])
            if kind.startswith("List[int") and _is_size(values[0], tensors) and argument is positional[-1]:
                taken.append(values)
                values = []
            else:
                taken.append(values.pop(0))
        elif argument.name in rest:
            taken.append(rest.pop(argument.name))
        elif argument.has_default_value():
            taken.append(argument.default_value)
        else:
            return None
        if not _fits(taken[-1], kind, tensors):
            return None
    keyword = {argument.name for argument in arguments if argument.kwarg_only}
    rest = {name: value for name, value in rest.items() if name in keyword or value is not None}
    return (tuple(taken), rest) if not values and rest.keys() <= keyword else None


def _is_size(value: Any, tensors: set[fx.Node]) -> bool:
    return type(value) is int or (
        isinstance(value, fx.Node) and value not in tensors and not _is_sizes(value)
    )


def _is_sizes(node: fx.Node) -> bool:
    """Whether a node is a whole shape, not one size of it."""
    if node.target is getattr:
        return node.args[1] == "shape"
    return node.target in (operator.add, operator.mul) and isinstance(node.args[0], (tuple, list))


def _fits(value: Any, kind: str, tensors: set[fx.Node]) -> bool:
    if kind.startswith("Optional["):
        return value is None or _fits(value, kind[len("Optional[") : -1], tensors)
    if kind == "Tensor":
        # numbers stand for tensors in arithmetic ("mul.Tensor(x, 2)"), as torch.export writes it
        return value in tensors if isinstance(value, fx.Node) else isinstance(value, (int, float))
    if kind.startswith(("List[Tensor", "List[Optional[Tensor")):
        return isinstance(value, (list, tuple)) and all(item is None or item in tensors for item in value)
    if kind.startswith(("List[int", "List[SymInt")):
        if isinstance(value, (list, tuple)):
            return all(_is_size(item, tensors) for item in value)
        return type(value) is int or (isinstance(value, fx.Node) and value not in tensors)
    if isinstance(value, fx.Node):
        return value not in tensors and kind != "str"
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, (bool, torch.dtype))
    if kind in ("float", "number"):
        return isinstance(value, (int, float))
    if kind == "str":
        return isinstance(value, str)
    if kind == "bool":
        return isinstance(value, bool)
    return True
