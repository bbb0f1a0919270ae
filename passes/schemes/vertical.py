"""Vertical layering: one weight code whose top bits serve every lower precision.

Hai Wu et al., "Vertical Layering of Quantized Neural Networks for Heterogeneous Inference". The symbols are
the paper's: the highest code c_K, the dropped bits d = K - b, the step s_b = 2^d s, the compensation z_b.
Gradients and constants that the paper leaves open are stated where they are used.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from qcompile.errors import InvalidArgument
from qcompile.modes import FLOAT_BITS

from ..batchnorm import BatchNormVariant
from ..distillation import cosine_distance, divergence
from ..expand_attention import ExpandAttention
from ..expand_products import ExpandProducts
from ..lsq import LsqActivationQuantizer
from ..manager import Pass
from ..quantize_layers import LayerQuantizers, QuantizeLayers
from ..split_batchnorm import SplitBatchNorm
from ..vertical_weights import VerticalWeightQuantizer
from .base import ModeOutput, Scheme, SchemeConfig, choice


@dataclass(frozen=True)
class VerticalConfig(SchemeConfig):
    """Options of the vertical scheme; the defaults are the paper's.

    Attributes:
        compensation: add z_b to every code of a lower mode (Sec. 4.1, Eq. 6).
        batch_norm: what batch normalisation keeps per mode (Table 4): `full`, `stats` or `shared`.
        moo: how the modes' losses are combined (Sec. 4.2.2): `us` weighs them equally, `mgd` takes the
            min-norm point of their gradients.
        distillation: how a mode learns from the next higher one (Sec. 4.2.3): `cosine`, `kl`, or None.
        step_gradient: `compensated` differentiates the compensated weight; `printed` leaves z out, as
            Eq. 8 is printed.
        weight_step: one step s for a layer's weight, as in the paper, one for each output `channel`, or one
            for each group of so many weights of a channel. A layer whose channels are not so many groups has
            one for each channel. In modes that multiply codes, linear layers alone have groups, and the steps
            of a channel's groups are 1 to 15 times one unit.
        first_last: what becomes of the first and the last layers: `float`, as in the paper; 8 for 8 bits of
            weights and inputs in every mode, and of the rows of embeddings, at learned steps; or `int8`, see
            `SchemeConfig`.
        products: whether to quantise both factors of products of activations, as attention has them. The
            paper has none.
    """

    compensation: bool = True
    batch_norm: BatchNormVariant = "full"
    moo: Literal["us", "mgd"] = "us"
    distillation: Literal["cosine", "kl"] | None = "cosine"
    step_gradient: Literal["compensated", "printed"] = "compensated"
    weight_step: Literal["layer", "channel"] | int = "layer"
    products: bool = False
    ends: ClassVar[tuple[str | int, ...]] = ("float", 8, "int8")

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("compensation", self.compensation, (True, False))
        choice("batch_norm", self.batch_norm, ("full", "stats", "shared"))
        choice("moo", self.moo, ("us", "mgd"))
        choice("distillation", self.distillation, ("cosine", "kl", None))
        choice("products", self.products, (True, False))
        choice("step_gradient", self.step_gradient, ("compensated", "printed"))
        group = isinstance(self.weight_step, int) and not isinstance(self.weight_step, bool)
        if not (self.weight_step in ("layer", "channel") or (group and int(self.weight_step) >= 1)):
            raise InvalidArgument(
                f"weight_step={self.weight_step!r} is neither 'layer' nor 'channel' nor a size of groups"
            )


#: Distances to the next higher mode, by the name of the option.
_DISTANCES = {"cosine": cosine_distance, "kl": divergence}


class VerticalScheme(Scheme):
    """One shared float weight, one shared step, K-bit codes of which a mode uses the top b bits."""

    name: ClassVar[str] = "vertical"
    config_type: ClassVar[type] = VerticalConfig
    without_logits: ClassVar[str] = "VerticalConfig(distillation=None)"
    prefix_decodable: ClassVar[bool] = True
    takes_weight_only: ClassVar[bool] = True

    def passes(self, skip: Collection[str]) -> list[Pass]:
        """Quantise the layers between the first and the last, then split batch normalisation."""
        activation_bits = [mode.activation_bits for mode in self.modes]
        weight_bits = [mode.weight_bits for mode in self.modes]

        fixed = [8] * len(self.modes)
        first_last = self._quantizers(
            fixed, [FLOAT_BITS if one == FLOAT_BITS else 8 for one in activation_bits]
        )
        return [
            *([ExpandAttention(), ExpandProducts()] if self.config.products else []),
            QuantizeLayers(
                *self._quantizers(weight_bits, activation_bits),
                skip=skip,
                first_last=first_last if self.config.first_last == 8 else self.calibrated_ends(),
                products=self.config.products,
                inputs=not all(mode.is_weight_only for mode in self.modes),
            ),
            SplitBatchNorm(len(self.modes), self.config.batch_norm),
        ]

    def _quantizers(self, weight_bits: Sequence[int], activation_bits: Sequence[int]) -> LayerQuantizers:
        covering = all(mode.is_weight_only for mode in self.modes)  # nothing that has to see data

        def weight(layer: Any) -> VerticalWeightQuantizer:
            return VerticalWeightQuantizer(
                weight_bits, self.config, layer.weight.shape, covering, not covering
            )

        return LayerQuantizers(weight, lambda signed: LsqActivationQuantizer(activation_bits, signed))

    def mode_weights(self) -> Sequence[float] | None:
        """Equal weights, or None for the min-norm point."""
        return None if self.config.moo == "mgd" else super().mode_weights()

    @property
    def needs_logits(self) -> bool:
        """Distillation compares outputs."""
        return self.config.distillation is not None and len(self.modes) > 1

    def mode_loss(self, row: int, output: ModeOutput) -> Tensor:
        """Task loss plus the distance to the next higher mode (Eq. 11); a float teacher guides every mode.

        The paper uses no teacher from outside. If there is one, KL(teacher || mode) is added for each mode.
        """
        loss = output.task_loss()
        guides = [(self.config.distillation, output.earlier.get(row + 1)), ("kl", output.teacher)]
        for kind, guide in guides:
            if kind is not None and guide is not None:
                loss = loss + output.distance(guide, _DISTANCES[kind])
        return loss
