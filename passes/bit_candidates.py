"""Which bits each layer may be drawn at, and how far training has come: what a resumed run goes on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from .layers import QuantizedLayer
from .manager import Pass, PassResult
from .module_tree import free_name, place_module
from .quantize_layers import LayerRecord
from .quantized_tensor import QuantizedTensor


class BitCandidates(nn.Module):
    """The state of weight coupling's training, in a model's state dict.

    Args:
        weight_bits: by path of the layers whose bits differ between modes, their candidates, increasing.
        activation_bits: candidates of all of them, increasing.

    Attributes:
        step: () int64, training steps so far, which decide what the next one draws.
        epoch: () int64, the last epoch that was told, -1 before.
        frozen: (layers,) bool, layers without their smallest weight candidate.
    """

    step: Tensor
    epoch: Tensor
    frozen: Tensor

    def __init__(self, weight_bits: Mapping[str, Sequence[int]], activation_bits: Sequence[int]) -> None:
        super().__init__()
        self.weight_bits = {name: tuple(bits) for name, bits in weight_bits.items()}
        self.activation_bits = tuple(activation_bits)
        self.register_buffer("step", torch.tensor(0))
        self.register_buffer("epoch", torch.tensor(-1))
        self.register_buffer("frozen", torch.zeros(len(self.weight_bits), dtype=torch.bool))

    def forget(self) -> None:
        """Begin again."""
        self.step.zero_()
        self.epoch.fill_(-1)
        self.frozen.zero_()

    def current(self) -> dict[str, tuple[int, ...]]:
        """Weight candidates of every layer; frozen ones lack their smallest."""
        found = zip(self.weight_bits.items(), self.frozen.tolist(), strict=True)
        return {name: bits[1:] if frozen else bits for (name, bits), frozen in found}

    def freeze(self, names: frozenset[str]) -> None:
        """Let exactly these layers lose their smallest candidate."""
        kept = [name in names for name in self.weight_bits]
        self.frozen.copy_(torch.tensor(kept, device=self.frozen.device))


class AddBitCandidates(Pass):
    """Put a `BitCandidates` into a graph of quantised layers.

    Args:
        activation_bits: of every mode, by row.
    """

    def __init__(self, activation_bits: Sequence[int]) -> None:
        self.activation_bits = sorted(set(activation_bits))

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Add the module; the graph stays as it is."""
        records: Sequence[LayerRecord] = graph_module.meta["layers"]
        found = {}
        for record in records:
            if record.quantized and not record.is_fixed:
                layer = graph_module.get_submodule(record.name)
                assert isinstance(layer, (QuantizedLayer, QuantizedTensor))
                found[record.name] = sorted(set(layer.weight_quantizer.own_bits))
        path = free_name(graph_module, "bit_candidates")
        place_module(graph_module, path, BitCandidates(found, self.activation_bits))
        return PassResult(graph_module, True)
