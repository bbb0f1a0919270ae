"""Products of codes with codes."""

from __future__ import annotations

import torch
from torch import fx

from qcompile.passes.code_types import FLOAT32_EXACT

from ..kernel_graph import Builder, Tap

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
