"""N2UQ: learned nonuniform thresholds, uniform values.

Zechun Liu et al., "Nonuniform-to-Uniform Quantization: Towards Accurate Quantization via Generalized
Straight-Through Estimation". Every mode is a network of its own in all but the weights.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from ..batchnorm import BatchNormVariant
from ..distillation import soft_cross_entropy
from ..entropy_weights import EntropyWeightQuantizer
from ..learned_thresholds import ThresholdActivationQuantizer
from ..manager import Pass
from ..quantize_layers import QuantizeLayers
from ..rprelu import ReplaceReLU
from ..split_batchnorm import SplitBatchNorm
from .base import ModeOutput, Scheme, SchemeConfig, choice, number


@dataclass(frozen=True)
class N2UQConfig(SchemeConfig):
    """Options of N2UQ; the defaults are the paper's.

    Attributes:
        learned_thresholds: train the thresholds (Sec. 3.2); without, they stay at equal distances.
        rescale_weights: entropy-preserving weight scales (Sec. 3.4); without, weights are quantised as in
            DoReFa-Net (the ablation of Table 3).
        rprelu: replace ReLU by RPReLU where the graph allows (Sec. 4.1).
        rprelu_slope: slope of RPReLU at the start; 0 leaves the float network's function as it is.
        downsample: quantise 1x1 convolutions with a stride, as residual networks have in their shortcuts.
        distillation: `soft` trains on the float teacher's probabilities (Sec. 4.1), the float original if no
            teacher is given; None trains on the task's loss.
        batch_norm: what batch normalisation keeps per mode.
        quantizer_lr: learning rate of thresholds and scales relative to that of the weights (Sec. 4.1).
        first_threshold: where the first interval begins before training (`start` in Eq. 12).
        smallest_interval: intervals between thresholds are held at least this large (Sec. 4.1).
        divide_gradient: divide the weights' gradient by their scale alpha, as the authors' code does.
        activation_scale: beta1 and beta2 start at 1 as in the paper (`unit`), or so that the first batch fits
            the thresholds (`data`), for networks that were trained in float.
    """

    learned_thresholds: bool = True
    rescale_weights: bool = True
    rprelu: bool = True
    rprelu_slope: float = 0.25
    downsample: bool = True
    distillation: Literal["soft"] | None = "soft"
    batch_norm: BatchNormVariant = "full"
    quantizer_lr: float = 0.1
    first_threshold: float = 0.0
    smallest_interval: float = 1e-3
    divide_gradient: bool = False
    activation_scale: Literal["unit", "data"] = "unit"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("learned_thresholds", "rescale_weights", "rprelu", "downsample", "divide_gradient"):
            choice(name, getattr(self, name), (True, False))
        choice("distillation", self.distillation, ("soft", None))
        choice("batch_norm", self.batch_norm, ("full", "stats", "shared"))
        choice("activation_scale", self.activation_scale, ("unit", "data"))
        number("rprelu_slope", self.rprelu_slope)
        number("quantizer_lr", self.quantizer_lr)
        number("first_threshold", self.first_threshold, least=-math.inf)
        number("smallest_interval", self.smallest_interval, above=0.0)


def _is_downsampling(layer: nn.Module) -> bool:
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return False
    return all(size == 1 for size in layer.kernel_size) and any(step > 1 for step in layer.stride)


class N2UQScheme(Scheme):
    """Learned thresholds for activations, entropy-preserving scales for weights."""

    name: ClassVar[str] = "n2uq"
    config_type: ClassVar[type] = N2UQConfig
    without_logits: ClassVar[str] = "N2UQConfig(distillation=None)"

    @property
    def quantizer_lr_factor(self) -> float:
        """One tenth in the paper."""
        factor: float = self.config.quantizer_lr
        return factor

    def passes(self, skip: Collection[str]) -> list[Pass]:
        """Replace ReLU, quantise the layers between the first and the last, split batch normalisation."""
        config: N2UQConfig = self.config
        weight_bits = [mode.weight_bits for mode in self.modes]
        activation_bits = [mode.activation_bits for mode in self.modes]
        from_data = config.activation_scale == "data"
        quantize = QuantizeLayers(
            weight_quantizer=lambda layer: EntropyWeightQuantizer(
                weight_bits, config.rescale_weights, config.divide_gradient
            ),
            activation_quantizer=lambda signed: ThresholdActivationQuantizer(
                activation_bits,
                from_data,
                config.learned_thresholds,
                config.first_threshold,
                config.smallest_interval,
            ),
            skip=skip,
            first_last=self.calibrated_ends(),
            reason_for_float=None if config.downsample else _reason_for_float,
        )
        replace = [ReplaceReLU(len(self.modes), config.rprelu_slope)] if config.rprelu else []
        return [*replace, quantize, SplitBatchNorm(len(self.modes), config.batch_norm)]

    @property
    def needs_logits(self) -> bool:
        """Distillation compares outputs."""
        return self.config.distillation is not None

    @property
    def needs_teacher(self) -> bool:
        """Distillation is from a float network."""
        return self.config.distillation is not None

    def mode_loss(self, row: int, output: ModeOutput) -> Tensor:
        """Soft cross-entropy to the teacher; the task's loss without distillation."""
        if self.config.distillation is None:
            return output.task_loss()
        assert output.teacher is not None, "the joint loss has checked it"
        return output.distance(output.teacher, soft_cross_entropy)


def _reason_for_float(layer: nn.Module) -> str | None:
    return "downsampling convolution (downsample=False)" if _is_downsampling(layer) else None
