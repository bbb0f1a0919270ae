"""Operators that overwrite their input where nothing else needs it: memory is what takes the time."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.model import QuantModel
from qcompile.passes.aten import aten_name
from qcompile.passes.batchnorm import ModeBatchNorm
from qcompile.passes.layers import QuantizedLayer
from qcompile.passes.mode_input import ModeModule

#: Operators with a form that writes into their first argument, and gives the same values.
_IN_PLACE: dict[str, Callable[..., Tensor]] = {
    "relu": torch.relu_,
    "hardtanh": torch.nn.functional.hardtanh_,
    "clamp": torch.clamp_,
    "clamp_min": torch.clamp_min_,
    "add": Tensor.add_,
    "mul": Tensor.mul_,
}


class Overwriting:
    """Decides how the nodes of a graph are called.

    Args:
        model: the graph's owner.
        by_batch: batch normalisation by the mean and variance of the batch itself.
    """

    def __init__(self, model: QuantModel, by_batch: bool) -> None:
        self._model, self._by_batch = model, by_batch

    def form(self, node: fx.Node, fresh: Container[fx.Node]) -> Callable[..., Any]:
        """What to call with a node's arguments.

        Args:
            node: a call of a function or a module.
            fresh: nodes whose values this run alone has, and only once.
        """
        source = node.args[0] if node.args else None
        may = (
            isinstance(source, fx.Node)
            and source in fresh
            and len(source.users) == 1
            and self._makes_new_memory(source)
        )
        if node.op == "call_module":
            module = self._model.get_submodule(str(node.target))
            if isinstance(module, ModeBatchNorm):
                function = module.overwrite_by_batch if self._by_batch else module.overwrite
                # the same arithmetic, or a candidate's values would depend on what it shares with another
                return function if may else _on_a_copy(function)
            return module.overwrite if isinstance(module, ModeModule) and may else module
        assert callable(node.target)
        in_place = _IN_PLACE.get(aten_name(node)) if may else None
        return node.target if in_place is None else _if_shapes_agree(in_place, node.target)

    def _makes_new_memory(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self._model.get_submodule(str(node.target)), (QuantizedLayer, ModeBatchNorm))
        return aten_name(node) in _IN_PLACE


def _on_a_copy(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, *others: function(x.clone(), *others)


def _if_shapes_agree(function: Callable[..., Tensor], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    def call(first: Tensor, *others: Any, **options: Any) -> Any:
        tensors = [one for one in others if isinstance(one, Tensor)]
        same = all(one.shape == first.shape and one.dtype == first.dtype for one in tensors)
        fits = same and first.is_floating_point()  # whole numbers may become others
        return (function if fits else otherwise)(first, *others, **options)

    return call
