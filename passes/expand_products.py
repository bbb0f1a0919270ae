"""Products of two activations in one form, so that their factors can be quantised."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .aten import arguments_of, aten_name
from .manager import Pass, PassResult

_ATEN = torch.ops.aten


class ExpandProducts(Pass):
    """`einsum` over one dimension of two tensors, and `baddbmm`, become `matmul` and what surrounds it."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite in place."""
        modified = False
        for node in list(graph_module.graph.nodes):
            rewrite = {"einsum": _einsum, "baddbmm": _baddbmm}.get(aten_name(node))
            if rewrite is None:
                continue
            with graph_module.graph.inserting_before(node):
                product = rewrite(node)
            if product is not None:
                node.replace_all_uses_with(product)
                graph_module.graph.erase_node(node)
                modified = True
        return PassResult(graph_module, modified)


def _call(node: fx.Node, target: Any, *args: Any) -> fx.Node:
    made = node.graph.call_function(target, args)
    made.meta = {key: value for key, value in node.meta.items() if key != "val"}
    return made


def _baddbmm(node: fx.Node) -> fx.Node:
    given = arguments_of(node)
    product = _call(node, _ATEN.matmul.default, given["batch1"], given["batch2"])
    summand = given["self"]
    if given["alpha"] != 1:
        product = _call(node, _ATEN.mul.Tensor, product, given["alpha"])
    if given["beta"] == 0:
        return product
    if given["beta"] != 1:
        summand = _call(node, _ATEN.mul.Tensor, summand, given["beta"])
    return _call(node, _ATEN.add.Tensor, product, summand)


def _einsum(node: fx.Node) -> fx.Node | None:
    given = arguments_of(node)
    equation = given["equation"].replace(" ", "")
    if "." in equation or "->" not in equation or len(given["tensors"]) != 2:
        return None
    terms, result = equation.split("->")
    left, right = terms.split(",")
    if any(len(set(one)) < len(one) for one in (left, right, result)):
        return None
    summed = [one for one in left if one in right and one not in result]
    batch = [one for one in result if one in left and one in right]
    rows, columns = ([one for one in result if one in mine and one not in batch] for mine in (left, right))
    used = {*summed, *batch, *rows, *columns}
    if not (len(summed) == len(rows) == len(columns) == 1) or used != {*left, *right}:
        return None

    def permuted(value: fx.Node, before: str, after: list[str]) -> fx.Node:
        order = [before.index(one) for one in after]
        return value if order == sorted(order) else _call(node, _ATEN.permute.default, value, order)

    a, b = given["tensors"]
    factors = permuted(a, left, batch + rows + summed), permuted(b, right, batch + summed + columns)
    product = _call(node, _ATEN.matmul.default, *factors)
    return permuted(product, "".join(batch + rows + columns), list(result))
