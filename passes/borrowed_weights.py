"""Layers whose weight and bias are made from tensors that other modules own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class BorrowedWeights:
    """Turns an instance of a layer's class into one that registers neither weight nor bias.

    Attributes:
        kind: the layer's own class.
        weight, bias: properties of subclasses.
    """

    kind: type[nn.Module]
    weight: Any
    bias: Any

    @classmethod
    def lend(cls, layer: nn.Module, **held: Any) -> None:
        """Change `layer` in place; it keeps what `held` names without registering it."""
        kind = type(layer)
        for name in ("weight", "bias"):
            layer._parameters.pop(name, None)
        layer.__class__ = type(f"{cls.__name__}{kind.__name__}", (cls, kind), {"kind": kind})
        layer.__dict__.update(held)

    def untied(self) -> nn.Module:
        """A layer of the own class that computes the same, with detached parameters of its own."""
        layer: Any = self.kind.__new__(self.kind)
        layer.__dict__.update(self.__dict__)
        tensors: tuple[tuple[str, Tensor | None], ...] = (("weight", self.weight), ("bias", self.bias))
        layer._parameters = {
            name: None if value is None else nn.Parameter(value.detach(), requires_grad=False)
            for name, value in tensors
        }
        return layer
