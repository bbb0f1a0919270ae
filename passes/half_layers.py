"""Layers of half branches: slices of a branch's layers that own no weights.

MBQuant, Sec. 3.3: the half branch of an odd bit-width uses the leading channels of the next branch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from .half_branch import LayerSlice
from .layers import QuantizedLayer
from .manager import Pass, PassResult
from .mode_input import ModeModule


def kept_weight(weight: Tensor, part: LayerSlice) -> Tensor:
    """The slice of a weight (out, in / groups, ...)."""
    outputs, inputs = list(part.weight_outputs), list(part.weight_inputs)
    # leading channels are a view, which costs no copy
    if outputs == list(range(len(outputs))) and inputs == list(range(len(inputs))):
        return weight[: len(outputs), : len(inputs)]
    return weight[outputs][:, inputs]


class SlicedLayer(QuantizedLayer):
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
    def weight(self) -> Tensor:  # type: ignore[override]
        """(out, in / groups, *kernel) of the kept channels."""
        return kept_weight(self.__dict__["source"].weight, self.part)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """(out,) of the kept channels, or None."""
        bias = self.__dict__["source"].bias
        return None if bias is None else bias[list(self.part.outputs)]

    @property
    def weight_quantizer(self) -> Any:  # type: ignore[override]
        """The branch's."""
        return self.__dict__["source"].weight_quantizer


class TieHalves(Pass):
    """Let the quantised layers of half branches take their weights from the branches."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Replace in place."""
        tied = 0
        for path, copied in graph_module.meta.get("copies", {}).items():
            layer = graph_module.get_submodule(path)
            if copied.part is None or not isinstance(layer, QuantizedLayer):
                continue
            source = graph_module.get_submodule(copied.of)
            assert isinstance(source, QuantizedLayer)
            sliced = SlicedLayer(source, copied.part)
            for name, child in layer.named_children():
                if name != "weight_quantizer":
                    sliced.add_module(name, child)
            graph_module.set_submodule(path, sliced)
            tied += 1
        return PassResult(graph_module, tied > 0)
