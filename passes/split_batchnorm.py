"""Batch normalisation of its own for every mode."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from .batchnorm import BatchNormVariant, ModeBatchNorm
from .layers import QuantizedLayer
from .manager import Pass, PassResult
from .mode_input import mode_placeholder
from .nearest_layers import NearestLayers
from .quantized_tensor import QuantizedTensor


class SplitBatchNorm(Pass):
    """Replace every batch normalisation by one that keeps parameters per mode.

    Args:
        rows: number of modes.
        variant: what is kept per mode.
        activation_bits: of every mode, by row. If given, modes in which the layer that is normalised has
            equal bits share what is kept; all of them where nothing before it is quantised.
    """

    def __init__(
        self, rows: int, variant: BatchNormVariant, activation_bits: Sequence[int] | None = None
    ) -> None:
        self.rows, self.variant, self.activation_bits = rows, variant, activation_bits

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite in place."""
        mode = mode_placeholder(graph_module.graph)
        calls: dict[str, list[fx.Node]] = {}
        for node in graph_module.graph.nodes:
            if node.op == "call_module" and isinstance(
                graph_module.get_submodule(str(node.target)), nn.modules.batchnorm._BatchNorm
            ):
                calls.setdefault(str(node.target), []).append(node)
        nearest = NearestLayers(graph_module)
        places = {path: self._places(graph_module, nearest.before(nodes)) for path, nodes in calls.items()}
        for path, nodes in calls.items():
            source = graph_module.get_submodule(path)
            assert isinstance(source, nn.modules.batchnorm._BatchNorm)
            graph_module.set_submodule(path, ModeBatchNorm(source, self.rows, self.variant, places[path]))
            for node in nodes:
                node.args = (node.args[0], mode)
        return PassResult(graph_module, bool(calls))

    def _places(self, graph_module: fx.GraphModule, before: Sequence[fx.Node]) -> list[int] | None:
        """By mode, the row of what follows these quantised layers; None for one each."""
        if self.activation_bits is None:
            return None
        path = str(before[-1].target) if before else None
        if path is None or path in {one.name for one in graph_module.meta["layers"] if one.is_fixed}:
            return [0] * self.rows
        layer = graph_module.get_submodule(path)
        assert isinstance(layer, (QuantizedLayer, QuantizedTensor))
        bits = list(zip(layer.weight_quantizer.own_bits, self.activation_bits, strict=True))
        distinct = list(dict.fromkeys(bits))
        return [distinct.index(one) for one in bits]
