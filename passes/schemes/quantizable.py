"""Quantizable networks: floor codes that nest, trained to agree with their own float parent.

Kunyuan Du et al., "From Quantized DNNs to Quantizable DNNs". The b-bit code of a weight or activation is the
top b bits of the K-bit code for every b < K, because thresholds are aligned (Sec. 3.5, Eq. 7). The mode of 32
bits is the parent: the same network without rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from qcompile.errors import InvalidArgument

from ..aligned import AlignedActivationQuantizer, AlignedWeightQuantizer
from ..batchnorm import BatchNormVariant, SplitBatchNorm
from ..distillation import divergence
from ..manager import Pass
from ..quantize_layers import QuantizeLayers
from .base import Scheme, choice

_BATCH_NORM: dict[str, BatchNormVariant] = {"A": "stats", "B": "full", "shared": "shared"}


@dataclass(frozen=True)
class QuantizableConfig:
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
    """

    batch_norm: Literal["A", "B", "shared"] = "B"
    loss: Literal["consistency", "task"] = "consistency"
    temperature: float = 2.0
    alpha: tuple[float, ...] | None = None
    activation_range: Literal["unit", "data"] = "unit"

    def __post_init__(self) -> None:
        choice("batch_norm", self.batch_norm, tuple(_BATCH_NORM))
        choice("loss", self.loss, ("consistency", "task"))
        choice("activation_range", self.activation_range, ("unit", "data"))
        if not self.temperature > 0:
            raise InvalidArgument(f"temperature={self.temperature!r} must be positive")
        if self.alpha is not None and not all(one > 0 for one in self.alpha):
            raise InvalidArgument(f"alpha={self.alpha!r} must hold positive numbers")


class QuantizableScheme(Scheme):
    """Floor codes of tanh-normalised weights, of which a mode uses the top b bits, and their float parent.

    Without the mode of 32 bits, the highest mode is the parent.
    """

    name: ClassVar[str] = "quantizable"
    config_type: ClassVar[type] = QuantizableConfig
    default_bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 32)
    prefix_decodable: ClassVar[bool] = True
    takes_float_mode: ClassVar[bool] = True

    def passes(self, skip: Collection[str]) -> list[Pass]:
        """Quantise the layers between the first and the last, then split batch normalisation."""
        weight_bits = [mode.weight_bits for mode in self.modes]
        activation_bits = [mode.activation_bits for mode in self.modes]
        from_data = self.config.activation_range == "data"
        return [
            QuantizeLayers(
                weight_quantizer=lambda layer: AlignedWeightQuantizer(weight_bits),
                activation_quantizer=lambda signed: AlignedActivationQuantizer(activation_bits, from_data),
                skip=skip,
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
        return self.config.loss == "consistency"

    def mode_loss(
        self,
        row: int,
        task_loss: Callable[[], Tensor],
        logits: Tensor | None,
        earlier: Mapping[int, Tensor],
        teacher: Tensor | None,
    ) -> Tensor:
        """The task's loss for the parent, the consistency loss for the others (Sec. 3.3).

        The paper uses no teacher from outside. If there is one, the parent is made consistent with it, too.
        """
        parent = len(self.modes) - 1
        temperature = self.config.temperature
        if row != parent and self.needs_logits:
            assert logits is not None
            return divergence(earlier[parent], logits, temperature)
        loss = task_loss()
        if teacher is not None and row == parent:
            if logits is None:
                raise InvalidArgument("a teacher needs the logits of every mode")
            loss = loss + divergence(teacher, logits, temperature)
        return loss
