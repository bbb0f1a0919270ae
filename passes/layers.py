"""Weighted layers whose weight a scheme quantises."""

from __future__ import annotations

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
        weight = marked(self.weight_quantizer(self.weight, active.row_of(self.slot)), active)
        # autocast multiplies in a half type; normalisation and residual streams that are rounded to it, too,
        # cost accuracy at 2 bits, so what follows a layer is in single precision again
        return apply_layer(self.geometry, x, weight, self.bias).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Shape and geometry, as torch layers show them."""
        return f"{tuple(self.weight.shape)}, {self.geometry}"
