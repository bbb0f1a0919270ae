"""How much the errors of single weights count: the mean square of what each is multiplied with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .passes.layers import QuantizedLayer

#: Inputs count at least this part of their mean: those that these batches leave at zero may not stay there.
LEAST_PART = 0.01


class InputEnergy:
    """Mean squares of the layers' inputs over all batches that pass while it watches.

    Args:
        model: whose quantised layers to watch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [one for one in model.modules() if isinstance(one, QuantizedLayer)]
        self._sums: dict[nn.Module, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at what passes through the layers."""

        def look(layer: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(layer, QuantizedLayer)
            x = args[0].detach().float()
            channels = 1 if layer.geometry.kind == "conv" else x.ndim - 1
            kept = [axis for axis in range(x.ndim) if axis != channels]
            total = x.square().sum(kept, dtype=torch.float64)
            self._sums[layer] = self._sums.get(layer, 0.0) + total

        hooks = [one.register_forward_pre_hook(look) for one in self._layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def of(self, module: nn.Module) -> Tensor:
        """What broadcasts against a module's weight, mean 1; ones where nothing is known of it."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        found = self._sums.get(module)
        mean = None if found is None else found.mean()
        if found is None or mean is None or not (0.0 < float(mean) < torch.inf):
            return weight.new_ones(())
        energy = (found / mean).clamp_min(LEAST_PART).to(weight)
        groups = module.geometry.groups if isinstance(module, QuantizedLayer) else 1
        # channel o of a convolution reads the inputs of its group
        by_group = energy.reshape(groups, 1, -1).expand(-1, len(weight) // groups, -1)
        return by_group.reshape(len(weight), -1, *[1] * (weight.ndim - 2))
