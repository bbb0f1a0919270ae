"""Maxima and sums over windows."""

from __future__ import annotations

from torch import fx

from qcompile.errors import LoweringError
from qcompile.passes.aten import arguments_of

from ..kernel_graph import Builder, Mapped, Rule
from ..kernels.elementwise import pool_kernel
from ..maps import Map
from .arguments import layer_of, spatial, two
from .floats import other


def pool(is_max: bool) -> Rule:
    """Maxima or sums over windows."""

    def rule(builder: Builder, node: fx.Node) -> None:
        kernel, stride, padding = (spatial(one) for one in node.args[1:4])
        if len(node.args[1]) == 1:
            padding = (0, padding[1])
        add_pool(builder, node, kernel, stride, padding, spatial(node.args[4]) if is_max else (1, 1), is_max)

    return rule


def float_max_pool(builder: Builder, node: fx.Node) -> None:
    """Maxima of floats over windows of images; others are left to TVM."""
    if len(builder.shape(node)) != 4:
        other(builder, node)
        return
    given = arguments_of(node)
    kernel, padding, dilation = (two(given[key]) for key in ("kernel_size", "padding", "dilation"))
    stride = two(given["stride"]) if given["stride"] else kernel
    add_pool(builder, node, kernel, stride, padding, dilation, True)


def integer_sum(builder: Builder, node: fx.Node) -> None:
    """The sum of all pixels of an integer image: one large window. Others are left to TVM."""
    given = arguments_of(node)
    source, dims = given["self"], given.get("dim")
    shape = builder.shape(source)
    if len(shape) != 4 or builder.dtype(node) != "int64" or sorted(d % 4 for d in dims or ()) != [2, 3]:
        other(builder, node)
        return
    have = builder.mapped(source, False)
    map = Map(shape[0], 1, 1, shape[1], "int64")
    (made,) = builder.kernel(
        layer_of(node),
        "sum_pool",
        [have.node],
        [(map.shape, map.dtype)],
        lambda name: pool_kernel(name, have.map, map, shape[2:], (1, 1), (0, 0), (1, 1), False),
    )
    builder.set_map(node, Mapped(made, map, len(builder.shape(node)) == 2))


def add_pool(
    builder: Builder,
    node: fx.Node,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    is_max: bool,
) -> None:
    if len(builder.shape(node)) > 4:
        raise LoweringError("pooling of volumes has no kernel on this target; lower to onnx-qdq")
    source = builder.mapped(node.args[0], False)
    dtype = source.map.dtype if is_max else "int64"
    map = builder.map_of(node, False, dtype, source.map.zero_point if is_max else 0)
    (made,) = builder.kernel(
        layer_of(node),
        "max_pool" if is_max else "sum_pool",
        [source.node],
        [(map.shape, map.dtype)],
        lambda name: pool_kernel(name, source.map, map, kernel, stride, padding, dilation, is_max),
    )
    builder.set_map(node, Mapped(made, map, False))
