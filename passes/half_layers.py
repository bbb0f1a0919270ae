"""Layers of half branches: slices of a branch's layers that own no weights.

MBQuant, Sec. 3.3: the half branch of an odd bit-width uses the leading channels of the next branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from .borrowed_weights import BorrowedWeights
from .computed_weights import Computed
from .half_branch import LayerSlice
from .layers import QuantizedLayer
from .manager import Pass, PassResult
from .mode_input import ModeModule
from .module_tree import tensor_at


def kept_weight(weight: Tensor, part: LayerSlice) -> Tensor:
    """The slice of a weight: (out, in / groups, ...), of transposed convolutions (in, out / groups, ...)."""
    rows, columns = list(part.rows), list(part.columns)
    # leading channels are a view, which costs no copy
    if rows == list(range(len(rows))) and columns == list(range(len(columns))):
        return weight[: len(rows), : len(columns)]
    return weight[rows][:, columns]


class _OfAnother:
    """Weight and bias of another layer, `source`, of which `part` is kept; neither is registered."""

    @property
    def weight(self) -> Tensor:
        """The kept channels of the weight."""
        return kept_weight(self.__dict__["source"].weight, self.__dict__["part"])

    @property
    def bias(self) -> Tensor | None:
        """(out,) of the kept channels, or None."""
        bias = self.__dict__["source"].bias
        return None if bias is None else bias[list(self.__dict__["part"].outputs)]


class SlicedLayer(_OfAnother, QuantizedLayer):  # type: ignore[override]
    """A quantised layer whose weight, bias and weight quantiser are those of another one, sliced.

    Args:
        source: the layer that owns them.
        part: what is kept.
    """

    def __init__(self, source: QuantizedLayer, part: LayerSlice) -> None:
        ModeModule.__init__(self)
        self.geometry = replace(source.geometry, groups=part.groups)
        self.part = part
        # not registered: its parameters are the branch's
        self.__dict__["source"] = source

    @property
    def weight_quantizer(self) -> Any:  # type: ignore[override]
        """The branch's."""
        return self.__dict__["source"].weight_quantizer


class SlicedWeights(_OfAnother, BorrowedWeights):
    """A layer that stays in float; weight and bias are those of another one, sliced."""


def unread_parameters(model: nn.Module, graphs: Sequence[fx.Graph]) -> list[nn.Parameter]:
    """Of a branch that only half branches use, what they do not borrow.

    Args:
        model: owner of the modules that the graphs call.
        graphs: of every mode.
    """
    if not any(isinstance(one, _OfAnother) for one in model.modules()):
        return []
    nodes = [node for graph in graphs for node in graph.nodes]
    run = [model.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"]
    read = {id(parameter) for one in run for parameter in one.parameters()}
    for source in (one.__dict__["source"] for one in run if isinstance(one, _OfAnother)):
        # not the quantiser of its input, which stands below it
        read |= {id(parameter) for parameter in source.parameters(recurse=False)}
        if isinstance(source, QuantizedLayer):
            read |= {id(parameter) for parameter in source.weight_quantizer.parameters()}
    paths = [str(node.target) for node in nodes if node.op == "get_attr"]
    paths += [path for one in run if isinstance(one, Computed) for path in one.program.paths]
    read |= {id(tensor_at(model, path)) for path in paths}
    return [parameter for parameter in model.parameters() if id(parameter) not in read]


class TieHalves(Pass):
    """Let the layers of half branches take their weights from the branches."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Replace in place."""
        tied = 0
        for path, copied in graph_module.meta.get("copies", {}).items():
            layer = graph_module.get_submodule(path)
            if copied.part is None:
                continue
            tied += 1
            source = graph_module.get_submodule(copied.of)
            if not isinstance(layer, QuantizedLayer):
                SlicedWeights.lend(layer, source=source, part=copied.part)
                continue
            assert isinstance(source, QuantizedLayer)
            sliced = SlicedLayer(source, copied.part)
            for name, child in layer.named_children():
                if name != "weight_quantizer":
                    sliced.add_module(name, child)
            graph_module.set_submodule(path, sliced)
        return PassResult(graph_module, tied > 0)
