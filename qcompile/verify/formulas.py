"""The schemes' quantisers as their papers state them, in numpy float64, for prepared models.

A scheme adds an entry with `register_formulas`. For a scheme without one, `verify` takes the codes that its
own quantisers declare, still checks every fold against the real chain, and says so in the report.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..model import QuantModel
from ..modes import Mode
from ..passes.layers import QuantizedLayer
from ..passes.quantizers import ActivationQuantizer
from .chain import as_array


@dataclass(frozen=True)
class ReferenceWeight:
    """A weight as `scale * (codes + numerator / 2**shift)`.

    Attributes:
        codes: int64, the weight's shape.
        scale: float64, a scalar or one value per output channel.
        numerator, shift: the offset.
    """

    codes: NDArray[np.int64]
    scale: NDArray[np.float64]
    numerator: int
    shift: int

    @property
    def real(self) -> NDArray[np.float64]:
        """The dequantised weight."""
        scale = self.scale.reshape(-1, *[1] * (self.codes.ndim - 1)) if self.scale.ndim else self.scale
        return np.asarray(scale * (self.codes + self.numerator * 2.0**-self.shift))


@dataclass(frozen=True)
class ReferenceGrid:
    """An activation as `step * code`, low <= code <= high."""

    step: float
    low: int
    high: int


class SchemeFormulas(Protocol):
    """What `verify` knows of one scheme."""

    def weight(self, model: QuantModel, layer: QuantizedLayer, mode: Mode) -> ReferenceWeight:
        """The integers of a layer's weight in one mode, from its latent weight."""

    def activation(
        self, model: QuantModel, quantizer: ActivationQuantizer, mode: Mode
    ) -> ReferenceGrid | None:
        """The grid of an activation quantiser in one mode; None if it is not uniform."""


class DeclaredFormulas:
    """What the scheme's own quantisers declare; not independent of the conversion."""

    def weight(self, model: QuantModel, layer: QuantizedLayer, mode: Mode) -> ReferenceWeight:
        """The quantiser's codes."""
        codes = layer.weight_quantizer.codes(layer.weight.detach(), model.row(mode))
        scale = as_array(codes.scale).astype(np.float64)
        integers = as_array(codes.codes).astype(np.int64)
        return ReferenceWeight(integers, scale, codes.offset_numerator, codes.offset_shift)

    def activation(
        self, model: QuantModel, quantizer: ActivationQuantizer, mode: Mode
    ) -> ReferenceGrid | None:
        """The quantiser's grid."""
        grid = quantizer.grid(model.row(mode))
        return ReferenceGrid(grid.scale, grid.low, grid.high)


class VerticalFormulas:
    """Vertical layering: Eq. 1 at K bits, Eq. 5 for the dropped bits, Eq. 6 for the compensation z_b."""

    #: Steps are held at least this large.
    smallest_step = 1e-8

    def weight(self, model: QuantModel, layer: QuantizedLayer, mode: Mode) -> ReferenceWeight:
        """c_b = floor(clip(round(W / s), -2^(K-1), 2^(K-1) - 1) / 2^d), s_b = 2^d s, z_b = (1 - 2^-d) / 2."""
        highest = max(one.weight_bits for one in model.prepared_modes)
        dropped = highest - mode.weight_bits
        quantizer: Any = layer.weight_quantizer
        step = max(float(as_array(quantizer.step)[0]), float(np.float32(self.smallest_step)))
        ratio = as_array(layer.weight).astype(np.float64) / step
        code = np.clip(np.rint(ratio), -(2 ** (highest - 1)), 2 ** (highest - 1) - 1).astype(np.int64)
        offset = (2**dropped - 1, dropped + 1) if dropped and quantizer.compensation else (0, 0)
        return ReferenceWeight(code >> dropped, np.asarray(step * 2.0**dropped), *offset)

    def activation(
        self, model: QuantModel, quantizer: ActivationQuantizer, mode: Mode
    ) -> ReferenceGrid | None:
        """Unsigned codes 0 .. 2^b - 1 where the tensor cannot be negative, two's complement elsewhere."""
        given: Any = quantizer
        step = max(float(as_array(given.step)[model.row(mode)]), float(np.float32(self.smallest_step)))
        bits = mode.activation_bits
        if given.signed:
            return ReferenceGrid(step, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return ReferenceGrid(step, 0, 2**bits - 1)


_FORMULAS: dict[str, SchemeFormulas] = {"vertical": VerticalFormulas()}


def register_formulas(scheme: str, formulas: SchemeFormulas) -> None:
    """Let `verify` recompute a scheme's quantisers independently; the name is that of the scheme."""
    _FORMULAS[scheme] = formulas


def find_formulas(scheme: str) -> SchemeFormulas | None:
    """A scheme's formulas, or None if it has registered none."""
    return _FORMULAS.get(scheme)
