"""Static shapes and sizes of every node of an integer graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.errors import InvalidArgument
from qcompile.passes.integer_model import IntegerModel


def static_values(model: IntegerModel, shapes: tuple[tuple[int, ...], ...]) -> dict[fx.Node, Any]:
    """Run the graph without data.

    Args:
        model: the integer graph.
        shapes: shapes of its inputs, batch included.

    Returns:
        By node: a tensor without content, a tuple of such, or a plain value such as a size.

    Raises:
        InvalidArgument: if the graph cannot run on inputs of these shapes.
    """
    inputs = [node for node in model.graph.nodes if node.op == "placeholder"]
    if len(inputs) != len(shapes):
        raise InvalidArgument(f"the model takes {len(inputs)} inputs, {len(shapes)} shapes were given")
    recorder = _Recorder(model, garbage_collect_values=False)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        tensors = [
            torch.empty(tuple(shape), dtype=node.meta.get("dtype", torch.float32))
            for node, shape in zip(inputs, shapes, strict=True)
        ]
        try:
            recorder.run(*tensors)
        except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError) as cause:
            listed = ", ".join(str(tuple(shape)) for shape in shapes)
            reason = (str(cause) or type(cause).__name__).splitlines()[0]
            raise InvalidArgument(f"the model does not run on inputs of shape {listed}: {reason}") from cause
    return recorder.values


class _Recorder(fx.Interpreter):
    values: dict[fx.Node, Any]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.values = {}
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]
