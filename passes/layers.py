"""Weighted layers whose weight a scheme quantises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from qcompile.modes import ActiveMode

from .geometry import Geometry
from .mode_input import ModeModule
from .quantizers import WeightQuantizer
from .recompute_mark import marked
from .rounding import apply_layer


class QuantizedLayer(ModeModule):
    """A convolution or linear layer with one latent float weight that serves every mode.

    Args:
        source: the float layer; its parameter objects are kept, so names and sharing survive.
        weight_quantizer: the scheme's quantiser for this layer's weight.

    Attributes:
        weight: (out, in / groups, *kernel) or (out, in) latent float parameter.
        bias: (out,) parameter or None.
        geometry: strides, padding, dilation, groups.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, source: Any, weight_quantizer: WeightQuantizer) -> None:
        super().__init__()
        self.geometry = Geometry.of(source)
        self.register_parameter("weight", source.weight)
        self.register_parameter("bias", source.bias)
        self.weight_quantizer = weight_quantizer
        weight_quantizer.initialise(self.weight.detach())

    def forward(self, x: Tensor, active: ActiveMode) -> Tensor:
        """Run the layer on an already quantised input: (N, C, *spatial) or (..., features)."""
        return self.multiply(x, self.weight, self.bias, active)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, active: ActiveMode) -> Tensor:
        """Run the layer with these float weights."""
        rounded = marked(self.weight_quantizer(weight, active.row_of(self.slot)), active)
        # autocast multiplies in a half type; normalisation and residual streams that are rounded to it, too,
        # cost accuracy at 2 bits, so what follows a layer is in single precision again
        return apply_layer(self.geometry, x, rounded, bias).to(weight.dtype)

    def float_weight(self, tensor_of: Callable[[str], Tensor | None], path: str) -> Tensor | None:
        """The latent weight that tensors by their paths give, None if they do not; `path` is the layer's."""
        return tensor_of(f"{path}.weight")

    def extra_repr(self) -> str:
        """Shape and geometry, as torch layers show them."""
        return f"{tuple(self.weight.shape)}, {self.geometry}"
