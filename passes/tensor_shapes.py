"""Shapes of all tensors of a float graph, without running it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.errors import InvalidArgument


def tensor_shapes(
    graph_module: fx.GraphModule, input_shapes: Sequence[Sequence[int]] | None = None
) -> dict[fx.Node, tuple[int, ...]]:
    """The shape of every node's tensor; nodes with other values are left out.

    Args:
        graph_module: the canonical float graph.
        input_shapes: shapes of its inputs, batch included; None: those of the example inputs, at batch 2.

    Raises:
        InvalidArgument: if the graph was captured without examples and no shapes are given, if there are too
            few or too many, or if the graph does not run on them.
    """
    return {node: tuple(one.shape) for node, one in tensors_of(graph_module, input_shapes).items()}


def tensors_of(
    graph_module: fx.GraphModule, input_shapes: Sequence[Sequence[int]] | None = None
) -> dict[fx.Node, Tensor]:
    """Tensors without data of every node's shape and type, as `tensor_shapes`."""
    inputs = list(graph_module.graph.find_nodes(op="placeholder"))
    if input_shapes is None:
        input_shapes = [_example_shape(node) for node in inputs]
    if len(input_shapes) != len(inputs):
        raise InvalidArgument(f"{len(input_shapes)} input shapes given for {len(inputs)} inputs of the model")
    like = next((one for one in graph_module.parameters() if one.is_floating_point()), torch.empty(0))
    recorder = ShapeRecorder(graph_module)
    with _evaluating(graph_module), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        values = [
            torch.empty(tuple(shape), dtype=_dtype(node, like), device=like.device)
            for node, shape in zip(inputs, input_shapes, strict=True)
        ]
        recorder.record(*values)
    return recorder.tensors


@contextmanager
def _evaluating(graph_module: fx.GraphModule) -> Iterator[None]:
    """In training mode, norms would count a batch that never was."""
    training = [module for module in graph_module.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _example_shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise InvalidArgument(
            f"input {node.name!r} has no known shape; pass example_inputs, to `prepare` or `capture`"
        )
    given = node.meta.get("example_shape", (2,) * value.ndim)
    sizes = [2 if dim == 0 else size for dim, size in enumerate(given)]
    return tuple(
        own if isinstance(size, torch.SymInt) else int(size)
        for size, own in zip(value.shape, sizes, strict=True)
    )


def _dtype(node: fx.Node, like: Tensor) -> torch.dtype:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) and not value.is_floating_point() else like.dtype


class ShapeRecorder(fx.Interpreter):
    """Runs a graph of tensors without data and notes them by node, in `tensors`."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.tensors: dict[fx.Node, Tensor] = {}

    @property
    def shapes(self) -> dict[fx.Node, tuple[int, ...]]:
        """By node."""
        return {node: tuple(one.shape) for node, one in self.tensors.items()}

    def record(self, *inputs: Any) -> None:
        """Run on inputs, tensors first.

        Raises:
            InvalidArgument: if the model cannot run on such inputs.
        """
        try:
            self.run(*inputs)
        except RuntimeError as cause:
            given = ", ".join(str(tuple(one.shape)) for one in inputs if isinstance(one, Tensor))
            reason = str(cause).splitlines()[0]
            raise InvalidArgument(f"the model does not run on inputs of shape {given}: {reason}") from cause

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.tensors[n] = result
        return result
