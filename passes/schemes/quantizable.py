"""Quantizable networks: floor codes that nest, trained to agree with their own float parent.

Kunyuan Du et al., "From Quantized DNNs to Quantizable DNNs". The b-bit code of a weight or activation is the
top b bits of the K-bit code for every b < K, because thresholds are aligned (Sec. 3.5, Eq. 7). The mode of 32
bits is the parent: the same network without rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor

from qcompile.errors import InvalidArgument

from ..aligned import AlignedActivationQuantizer, AlignedWeightQuantizer
from ..batchnorm import BatchNormVariant
from ..distillation import divergence
from ..manager import Pass
from ..quantize_layers import QuantizeLayers
from ..split_batchnorm import SplitBatchNorm
from .base import ModeOutput, Scheme, SchemeConfig, choice, number

_BATCH_NORM: dict[str, BatchNormVariant] = {"A": "stats", "B": "full", "shared": "shared"}


@dataclass(frozen=True)
class QuantizableConfig(SchemeConfig):
    """Options of the quantizable scheme; the defaults are the paper's.

    Attributes:
        batch_norm: bit-specific batch normalisation (Sec. 3.4): variant `A` has its own running statistics
            per mode, `B` its own affine parameters too; `shared` is the ablation of Table 4.
        loss: what modes below the parent learn from (Sec. 3.3): `consistency` with the parent (Eq. 3), or the
            task's own loss (`task`, Table 5).
        temperature: T of the consistency loss (Sec. 4.1).
        alpha: weight of every mode's loss, one number each in increasing order of modes; None for 1 (Eq. 2).
        activation_range: activations are clipped to [0, 1] as in DoReFa-Net (`unit`), or to [0, s] with one s
            per tensor for all modes, from the first batch (`data`), for networks that were trained in float.
        weight_deviations: divide tanh W by so many of its root mean squares instead of by its maximum (where
            they are less), and clip: weights that were trained in float have outliers, which leave the levels
            of few bits far apart. None for the maximum, as in the paper.
    """

    batch_norm: Literal["A", "B", "shared"] = "B"
    loss: Literal["consistency", "task"] = "consistency"
    temperature: float = 2.0
    alpha: tuple[float, ...] | None = None
    activation_range: Literal["unit", "data"] = "unit"
    weight_deviations: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("batch_norm", self.batch_norm, tuple(_BATCH_NORM))
        choice("loss", self.loss, ("consistency", "task"))
        choice("activation_range", self.activation_range, ("unit", "data"))
        number("temperature", self.temperature, above=0.0)
        if self.weight_deviations is not None:
            number("weight_deviations", self.weight_deviations, above=0.0)
        if not (self.alpha is None or isinstance(self.alpha, (tuple, list))):
            raise InvalidArgument(f"alpha={self.alpha!r} is not a tuple of numbers, one for each mode")
        for index, one in enumerate(self.alpha or ()):
            number(f"alpha[{index}]", one, above=0.0)


class QuantizableScheme(Scheme):
    """Floor codes of tanh-normalised weights, of which a mode uses the top b bits, and their float parent.

    Without the mode of 32 bits, the highest mode is the parent.
    """

    name: ClassVar[str] = "quantizable"
    config_type: ClassVar[type] = QuantizableConfig
    without_logits: ClassVar[str] = "QuantizableConfig(loss='task')"
    default_bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 32)
    prefix_decodable: ClassVar[bool] = True
    takes_float_mode: ClassVar[bool] = True

    def passes(self, skip: Collection[str]) -> list[Pass]:
        """Quantise the layers between the first and the last, then split batch normalisation.

        Raises:
            InvalidArgument: if the config's alpha has another number of entries than there are modes.
        """
        self.mode_weights()
        weight_bits = [mode.weight_bits for mode in self.modes]
        activation_bits = [mode.activation_bits for mode in self.modes]
        from_data = self.config.activation_range == "data"
        return [
            QuantizeLayers(
                weight_quantizer=lambda layer: AlignedWeightQuantizer(
                    weight_bits, self.config.weight_deviations
                ),
                activation_quantizer=lambda signed: AlignedActivationQuantizer(activation_bits, from_data),
                skip=skip,
                first_last=self.calibrated_ends(),
            ),
            SplitBatchNorm(len(self.modes), _BATCH_NORM[self.config.batch_norm]),
        ]

    def mode_weights(self) -> Sequence[float]:
        """1 for every mode, or the config's alpha."""
        count = len(self.modes)
        alpha: tuple[float, ...] = self.config.alpha or (1.0,) * count
        if len(alpha) != count:
            raise InvalidArgument(f"alpha={alpha!r} must hold one number for each of the {count} modes")
        return alpha

    @property
    def needs_logits(self) -> bool:
        """The consistency loss compares outputs."""
        return self.config.loss == "consistency" and len(self.modes) > 1

    def mode_loss(self, row: int, output: ModeOutput) -> Tensor:
        """The task's loss for the parent, the consistency loss for the others (Sec. 3.3).

        The paper uses no teacher from outside. If there is one, the parent is made consistent with it, too.
        """
        parent = len(self.modes) - 1
        measure = partial(divergence, temperature=self.config.temperature)
        if row != parent and self.needs_logits:
            return output.distance(output.earlier[parent], measure)
        loss = output.task_loss()
        if output.teacher is not None and row == parent:
            loss = loss + output.distance(output.teacher, measure)
        return loss
