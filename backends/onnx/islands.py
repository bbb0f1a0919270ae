"""One float operator while it is emitted, and the rule that its writer becomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import helper
from torch import fx

from qcompile.passes.aten import arguments_of

from .emit import Emitter, layer_of
from .torch_operator import torch_operator
from .values import Plain, Value


class Island:
    """One float operator while it is emitted: its arguments by name, and how to write nodes for it."""

    def __init__(self, emitter: Emitter, node: fx.Node) -> None:
        self.emitter, self.node, self.layer = emitter, node, layer_of(node)
        self.given = {key: emitter.static(value) for key, value in arguments_of(node).items()}

    def tensor(self, key: str, dtype: np.dtype[Any] | None = None) -> str:
        """A tensor or number among the arguments, as a tensor of the given type."""
        value = self.given[key]
        if not isinstance(value, fx.Node):
            return self.constant(key, value, self.emitter.dtype(self.node) if dtype is None else dtype)
        name = self.emitter.tensor(value)
        if dtype is None or self.emitter.dtype(value) == dtype:
            return name
        return self.emit("Cast", [name], f".{key}", to=int(helper.np_dtype_to_tensor_dtype(dtype)))

    def constant(self, what: str, value: Any, dtype: Any = np.float32) -> str:
        """A constant of this operator."""
        return self.emitter.builder.initializer(f"{self.layer}/{what}", value, dtype)

    def emit(self, operator: str, inputs: Sequence[str], suffix: str = "", **attributes: Any) -> str:
        """A node; the one without suffix is the operator's result."""
        name = f"{self.layer}/{operator.lower()}"
        return self.emitter.builder.node(operator, inputs, self.node.name + suffix, name, **attributes)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor among the arguments."""
        return self.emitter.shape(self.given[key])

    @property
    def spatial(self) -> int:
        """Spatial dimensions of the result."""
        return len(self.emitter.shape(self.node)) - 2


#: Emits one operator; None where its arguments need the general way.
Writer = Callable[[Island], "str | None"]


def island(writer: Writer) -> Callable[[Emitter, fx.Node], Value]:
    """The rule of a float operator."""

    def rule(emitter: Emitter, node: fx.Node) -> Value:
        name = writer(Island(emitter, node))
        return torch_operator(emitter, node) if name is None else Plain(name)

    return rule
