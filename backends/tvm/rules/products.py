"""Products of what was computed: of floats, and of codes with codes."""

from __future__ import annotations

import torch
from torch import fx

from qcompile.passes.aten import arguments_of
from qcompile.passes.code_types import FLOAT32_EXACT

from ..kernel_graph import Builder, Tap
from ..kernels.products import float_product_kernel
from .arguments import layer_of
from .floats import other

_ATEN = torch.ops.aten


def product(builder: Builder, node: fx.Node) -> None:
    """Pieces of the sums that float32 holds exactly, added up as integers."""
    left, right, bound = node.args
    a, b = builder.plain(left), builder.plain(right)
    rank_a, rank_b = len(builder.shape(left)), len(builder.shape(right))
    length = builder.shape(left)[-1]
    largest = max(1, -(-int(bound) // length))  # of one product
    size = (FLOAT32_EXACT - 1) // largest
    call = builder.graph.call_function
    total = None
    for start in range(0, length, size):
        stop = min(start + size, length)
        one = a if size >= length else call(_ATEN.slice.Tensor, (a, rank_a - 1, start, stop))
        other = b if size >= length else call(_ATEN.slice.Tensor, (b, rank_b - 2, start, stop))
        real = [call(_ATEN.to.dtype, (each, torch.float32)) for each in (one, other)]
        sums = call(_ATEN.to.dtype, (call(_ATEN.matmul.default, tuple(real)), torch.int32))
        total = sums if total is None else call(_ATEN.add.Tensor, (total, sums))
    builder.set_plain(node, total)
    if builder.tapped:
        builder.taps[node.name] = Tap(builder.mapped(node, True), builder.shape(node))


def float_product(builder: Builder, node: fx.Node) -> None:
    """A product of as many matrices with as many; others are left to TVM."""
    first, second = node.args[0], node.args[1]
    rows, columns = builder.shape(first), builder.shape(second)
    alike = len(rows) >= 2 and rows[:-2] == columns[:-2]
    if not alike or {builder.dtype(first), builder.dtype(second)} != {"float32"}:
        other(builder, node)
        return
    is_transposed = _swaps_last(builder, second)
    read = second.args[0] if is_transposed else second
    (made,) = builder.kernel(
        layer_of(node),
        "float_product",
        [builder.plain(first), builder.plain(read)],
        [(builder.shape(node), "float32")],
        lambda name: float_product_kernel(name, rows, builder.shape(read), is_transposed),
    )
    builder.set_plain(node, made)


def _swaps_last(builder: Builder, node: fx.Node) -> bool:
    """Whether a node is the transpose of matrices, which the kernel reads as they lie."""
    if builder.model.operator_name(node) != "aten.transpose":
        return False
    given, rank = arguments_of(node), len(builder.shape(node))
    return {int(given[key]) % rank for key in ("dim0", "dim1")} == {rank - 2, rank - 1}
