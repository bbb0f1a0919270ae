"""Sums of products with a tensor of parameters, as `einsum` writes them, become linear layers."""

from __future__ import annotations

import math

import torch
from torch import fx

from qcompile.passes.aten import arguments_of
from qcompile.passes.manager import Pass, PassResult
from qcompile.passes.normalise_inplace import FUNCTIONAL
from qcompile.passes.static_tensors import StaticTensors

_aten = torch.ops.aten


class EinsumAsLinear(Pass):
    """`einsum("bih,hnd->bind", x, W)` becomes a linear layer between permutations.

    Where x and parameters share no dimension that the result keeps, too: those are products in batches.
    """

    requires = (FUNCTIONAL,)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite in place."""
        static, modified = StaticTensors(graph_module), False
        for node in list(graph_module.graph.find_nodes(op="call_function", target=_aten.einsum.default)):
            given = arguments_of(node)
            operands, equation = given["tensors"], given["equation"].replace(" ", "")
            fixed = [one for one in operands if static(one) is not None]
            if len(operands) != 2 or len(fixed) != 1 or "." in equation or "->" not in equation:
                continue
            left, result = equation.split("->")
            letters = dict(zip(operands, left.split(","), strict=True))
            weight = fixed[0]
            x = operands[1 - operands.index(weight)]
            if not _is_linear(letters[x], letters[weight], result):
                continue
            sizes = dict(zip(letters[weight], static(weight).shape, strict=True))  # type: ignore[union-attr]
            with graph_module.graph.inserting_before(node):
                product = _product(node, x, weight, letters[x], letters[weight], result, sizes)
            product.meta = dict(node.meta)
            node.replace_all_uses_with(product)
            graph_module.graph.erase_node(node)
            modified = True
        return PassResult(graph_module, modified)


def _is_linear(x: str, weight: str, result: str) -> bool:
    once = all(len(set(one)) == len(one) for one in (x, weight, result))
    shared = set(x) & set(weight)
    kept = (set(x) | set(weight)) - shared
    return once and bool(shared) and bool(set(weight) - shared) and set(result) == kept


def _product(
    node: fx.Node, x: fx.Node, weight: fx.Node, of_x: str, of_weight: str, result: str, sizes: dict[str, int]
) -> fx.Node:
    graph, meta = node.graph, {key: node.meta[key] for key in ("source", "module_path") if key in node.meta}

    def call(target: object, *args: object) -> fx.Node:
        made = graph.call_function(target, args)  # type: ignore[arg-type]
        made.meta = dict(meta)
        return made

    def permuted(value: fx.Node, before: str, after: str) -> fx.Node:
        return value if before == after else call(_aten.permute.default, value, [*map(before.index, after)])

    summed = "".join(letter for letter in of_weight if letter in of_x)
    rows = "".join(letter for letter in of_x if letter not in summed)
    columns = "".join(letter for letter in result if letter in of_weight)
    x = permuted(x, of_x, rows + summed)
    if len(summed) > 1:
        x = call(_aten.flatten.using_ints, x, len(rows))
    matrix = permuted(weight, of_weight, columns + summed)
    if len(of_weight) > 2:
        shape = [math.prod(sizes[letter] for letter in part) for part in (columns, summed)]
        matrix = call(_aten.reshape.default, matrix, shape)
    product = call(_aten.linear.default, x, matrix)
    if len(columns) > 1:
        product = call(_aten.unflatten.int, product, -1, [sizes[letter] for letter in columns])
    return permuted(product, rows + columns, result)
