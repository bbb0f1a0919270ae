"""Find out, for every module that depends on the mode, which layers' modes decide its own."""

from __future__ import annotations

from torch import fx

from .batchnorm import ModeBatchNorm
from .layers import QuantizedLayer
from .manager import Pass, PassResult
from .mode_input import ModeModule
from .nearest_layers import NearestLayers
from .quantized_tensor import QuantizedTensor
from .quantizers import ActivationQuantizer


class AssignSlots(Pass):
    """Give each `ModeModule` its slot among the rows of a policy, and the layers that decide its mode.

    A quantised layer decides for itself; the layers that read a quantiser's output decide for the quantiser;
    a batch normalisation follows the last quantised layer before it, and the first after it where there is
    none before. Batch normalisation also gets its place among the statistics of a policy.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Set attributes of the modules; the graph stays as it is."""
        calls: dict[str, list[fx.Node]] = {}
        for node in graph_module.graph.nodes:
            if node.op == "call_module" and isinstance(graph_module.get_submodule(node.target), ModeModule):
                calls.setdefault(str(node.target), []).append(node)

        nearest = NearestLayers(graph_module)
        place = 0
        for slot, (path, nodes) in enumerate(calls.items()):
            module = graph_module.get_submodule(path)
            assert isinstance(module, ModeModule)
            module.slot = slot
            if isinstance(module, ModeBatchNorm) and module.running_mean is not None:
                module.place = place
                place += 2 * module.num_features
            if isinstance(module, (QuantizedLayer, QuantizedTensor)):
                deciding = nodes[:1]
            elif isinstance(module, ActivationQuantizer):
                deciding = nearest.after(nodes)
            else:
                deciding = nearest.deciding(nodes)
            module.layers = tuple(dict.fromkeys(str(node.target) for node in deciding))
        return PassResult(graph_module, bool(calls))
