"""Layers of half branches: slices of a branch's layers that own no weights.

MBQuant, Sec. 3.3: the half branch of an odd bit-width uses the leading channels of the next branch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from .borrowed_weights import BorrowedWeights
from .half_branch import LayerSlice
from .layers import QuantizedLayer
from .manager import Pass, PassResult
from .mode_input import ModeModule


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
