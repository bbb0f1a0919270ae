"""Put activation quantisers in front of what multiplies codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from .aten import commutes_with_quantizer
from .module_tree import place_module
from .quantizers import ActivationQuantizer
from .sign import NonNegative

#: Builds the quantiser of one tensor, told whether it can be negative.
BuildQuantizer = Callable[[bool], ActivationQuantizer]


class InputQuantizers:
    """Quantises the tensors that operators of one graph read, each tensor once for each kind of quantiser.

    A quantiser works element by element and is monotone, so it is placed as early as it can be without
    changing what others read: before padding, flattening and max pooling. Operators that read the same tensor
    share its quantiser, and with it one tensor of codes at run time.

    Args:
        graph_module: the graph's owner, not rewritten yet.
        mode: the placeholder of the active mode.
    """

    def __init__(self, graph_module: fx.GraphModule, mode: fx.Node) -> None:
        self._graph_module, self._mode = graph_module, mode
        self._non_negative = NonNegative(graph_module)
        for node in graph_module.graph.nodes:  # decided before any rewrite, on the float graph
            self._non_negative(node)
        self._done: dict[tuple[fx.Node, BuildQuantizer], fx.Node] = {}

    def quantize(
        self, node: fx.Node, source: fx.Node, build: BuildQuantizer, path: str, like: torch.Tensor
    ) -> None:
        """Let `node` read `source` quantised.

        Args:
            node: an operator.
            source: one of its inputs.
            build: makes the quantiser.
            path: of the quantiser's module; a number is added where it is taken.
            like: has the device and dtype of its parameters.
        """
        consumer = node
        while commutes_with_quantizer(source) and len(source.users) == 1:
            consumer, source = source, source.all_input_nodes[0]
        if source in self._done.values():
            return  # a call of the same tensor went the same way
        if (source, build) not in self._done:
            siblings = sum(str(one.target).startswith(path) for one in self._done.values())
            path = path if not siblings else f"{path}_{siblings}"
            quantizer = build(not self._non_negative(source))
            place_module(self._graph_module, path, quantizer.to(like.device, like.dtype))
            after = self._mode if source.op in ("placeholder", "get_attr") else source
            with self._graph_module.graph.inserting_after(after):
                self._done[source, build] = self._graph_module.graph.call_module(path, (source, self._mode))
        consumer.replace_input_with(source, self._done[source, build])
