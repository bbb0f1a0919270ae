"""Shapes of all tensors of a training graph, without running it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from qcompile.modes import ActiveMode

from .borrowed_weights import BorrowedWeights
from .convert_emit import input_dtype
from .eval_identities import IDENTITIES_IN_EVAL
from .layers import QuantizedLayer
from .mode_input import MODE_INPUT, ModeModule
from .module_tree import float_dtype
from .quantized_tensor import QuantizedTensor
from .tensor_shapes import ShapeRecorder


def _as_parameters(dtype: torch.dtype, own: torch.dtype | None) -> torch.dtype:
    return own if own is not None and dtype.is_floating_point else dtype


class FakeRun(ShapeRecorder):
    """A run of a training graph in evaluation on tensors without values: only their shapes count."""

    def trace(self, shapes: Sequence[Sequence[int]]) -> dict[fx.Node, tuple[int, ...]]:
        """Shapes by node for inputs of the given shapes.

        Raises:
            InvalidArgument: if the model cannot run on such inputs.
        """
        inputs = [
            node
            for node in self.module.graph.nodes
            if node.op == "placeholder" and not node.meta.get(MODE_INPUT)
        ]
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            own = float_dtype(self.module)
            values = [
                torch.empty(tuple(shape), dtype=_as_parameters(input_dtype(node), own))
                for node, shape in zip(inputs, shapes, strict=True)
            ]
            self.record(*values, ActiveMode())
        return self.shapes

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = super().get_attr(target, args, kwargs)
        return found.detach() if isinstance(found, Tensor) else found  # fake views would ask for gradients

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.module.get_submodule(target)
        # weights may be computed from parameters, which is done on their values
        with unset_fake_temporarily(), torch.no_grad():
            if isinstance(module, QuantizedLayer):
                weight = torch.empty_like(module.weight)
                bias = None if module.bias is None else torch.empty_like(module.bias)
            elif isinstance(module, BorrowedWeights):
                module = module.untied()
        if isinstance(module, QuantizedLayer):
            return module.geometry.apply(args[0], weight, bias)
        if isinstance(module, QuantizedTensor):
            with unset_fake_temporarily(), torch.no_grad():
                return torch.empty_like(module.weight)
        if isinstance(module, (ModeModule, *IDENTITIES_IN_EVAL)):
            return args[0]
        return module(*args, **kwargs)
