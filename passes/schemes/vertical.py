"""Vertical layering: one weight code whose top bits serve every lower precision.

Hai Wu et al., "Vertical Layering of Quantized Neural Networks for Heterogeneous Inference". The symbols are
the paper's: the highest code c_K, the dropped bits d = K - b, the step s_b = 2^d s, the compensation z_b.
Gradients and constants that the paper leaves open are stated where they are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from qcompile.errors import InvalidArgument
from qcompile.modes import ActiveMode, Mode

from ..batchnorm import BatchNormVariant, SplitBatchNorm
from ..lsq import SMALLEST_STEP, LsqActivationQuantizer, hold_positive
from ..manager import Pass
from ..quantize_layers import QuantizeLayers
from ..quantizers import WeightCodes, WeightQuantizer
from .base import Scheme, choice


@dataclass(frozen=True)
class VerticalConfig:
    """Options of the vertical scheme; the defaults are the paper's.

    Attributes:
        compensation: add z_b to every code of a lower mode (Sec. 4.1, Eq. 6).
        batch_norm: what batch normalisation keeps per mode (Table 4): `full`, `stats` or `shared`.
        moo: how the modes' losses are combined (Sec. 4.2.2): `us` weighs them equally, `mgd` takes the
            min-norm point of their gradients.
        distillation: how a mode learns from the next higher one (Sec. 4.2.3): `cosine`, `kl`, or None.
        step_gradient: `compensated` differentiates the compensated weight; `printed` leaves z out, as
            Eq. 8 is printed.
    """

    compensation: bool = True
    batch_norm: BatchNormVariant = "full"
    moo: Literal["us", "mgd"] = "us"
    distillation: Literal["cosine", "kl"] | None = "cosine"
    step_gradient: Literal["compensated", "printed"] = "compensated"

    def __post_init__(self) -> None:
        choice("compensation", self.compensation, (True, False))
        choice("batch_norm", self.batch_norm, ("full", "stats", "shared"))
        choice("moo", self.moo, ("us", "mgd"))
        choice("distillation", self.distillation, ("cosine", "kl", None))
        choice("step_gradient", self.step_gradient, ("compensated", "printed"))


def highest_code(weight: Tensor, step: Tensor, highest_bits: int) -> Tensor:
    """c_K = clip(round(W / s), -2^(K-1), 2^(K-1) - 1), ties to even; same shape and dtype as `weight`."""
    limit = 2 ** (highest_bits - 1)
    return torch.clamp(torch.round(weight / step), -limit, limit - 1)


def lower_code(highest: Tensor, dropped_bits: int) -> Tensor:
    """c_b = floor(c_K / 2^d) (Eq. 5 applied d times)."""
    return torch.floor(highest * 2.0**-dropped_bits)


def compensation(dropped_bits: int) -> tuple[int, int]:
    """z_b = (1 - 2^-d) / 2 as (numerator, shift): numerator / 2^shift."""
    return (2**dropped_bits - 1, dropped_bits + 1) if dropped_bits else (0, 0)


class _VerticalWeight(torch.autograd.Function):
    """Dequantised weight s_b (c_b + z_b), straight-through backward.

    dW = g inside the K-bit clip range, one mask for all modes. ds = g_s 2^d sum(g e) with
    e = c_b + z_b - W / s_b inside and c_b + z_b outside, g_s the LSQ gradient scale of the highest mode.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, step: Tensor, highest_bits: int, dropped: int, z: float, printed: bool
    ) -> Tensor:
        step_b = step * 2.0**dropped
        code = lower_code(highest_code(weight, step, highest_bits), dropped)
        ctx.save_for_backward(weight, step, code)
        ctx.highest_bits, ctx.dropped, ctx.z = highest_bits, dropped, 0.0 if printed else z
        return (code + z) * step_b

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, step, code = ctx.saved_tensors
        gradient, limit = gradients[0], 2 ** (ctx.highest_bits - 1)
        ratio = weight / step
        inside = (ratio >= -limit) & (ratio <= limit - 1)
        error = code + ctx.z - torch.where(inside, ratio * 2.0**-ctx.dropped, 0.0)
        scale = 1.0 / math.sqrt(max(1, limit - 1) * weight.numel())
        d_step = (gradient * error).sum() * (scale * 2.0**ctx.dropped)
        return torch.where(inside, gradient, 0.0), d_step.reshape(step.shape), None, None, None, None


class VerticalWeightQuantizer(WeightQuantizer):
    """Nested floor codes of one weight.

    Attributes:
        step: () float parameter, the step size s of the highest mode.
    """

    def __init__(self, highest_bits: int, config: VerticalConfig) -> None:
        super().__init__()
        self.highest_bits = highest_bits
        self.compensation = config.compensation
        self.printed = config.step_gradient == "printed"
        self.step = nn.Parameter(torch.ones(()))

    def initialise(self, weight: Tensor) -> None:
        """s = 2 mean|W| / sqrt(2^K - 1) (Sec. 6.1, printed there for K = 4)."""
        step = 2.0 * weight.abs().mean() / math.sqrt(2**self.highest_bits - 1)
        with torch.no_grad():
            self.step.data = step.clamp_min(SMALLEST_STEP).to(weight.dtype)

    def forward(self, weight: Tensor, active: ActiveMode) -> Tensor:
        """s_b (c_b + z_b), the shape of `weight`."""
        dropped = self.highest_bits - active.mode.weight_bits
        numerator, shift = compensation(dropped) if self.compensation else (0, 0)
        step = hold_positive(self.step)
        z = numerator * 2.0**-shift
        return _VerticalWeight.apply(weight, step, self.highest_bits, dropped, z, self.printed)

    def codes(self, weight: Tensor, mode: Mode) -> WeightCodes:
        """The mode's integer codes, from W and s in float64."""
        dropped = self.highest_bits - mode.weight_bits
        step = hold_positive(self.step.detach()).double()
        code = lower_code(highest_code(weight.detach().double(), step, self.highest_bits), dropped)
        numerator, shift = compensation(dropped) if self.compensation else (0, 0)
        return WeightCodes(
            code.to(torch.int16), mode.weight_bits, True, step * 2.0**dropped, numerator, shift
        )

    def extra_repr(self) -> str:
        """Bits and compensation."""
        return f"highest_bits={self.highest_bits}, compensation={self.compensation}"


def distillation_loss(kind: str, teacher: Tensor, student: Tensor) -> Tensor:
    """Distance of the student's softmax to the teacher's, mean over the batch.

    Args:
        kind: `cosine` (1 - cosine similarity of the probabilities) or `kl` (KL(teacher || student)).
        teacher, student: (N, classes, ...) logits; the teacher's are treated as constants.
    """
    teacher = functional.softmax(teacher.detach(), dim=1)
    if kind == "cosine":
        return (1.0 - functional.cosine_similarity(teacher, functional.softmax(student, dim=1), dim=1)).mean()
    return functional.kl_div(functional.log_softmax(student, dim=1), teacher, reduction="none").sum(1).mean()


class VerticalScheme(Scheme):
    """One shared float weight, one shared step, K-bit codes of which a mode uses the top b bits."""

    name: ClassVar[str] = "vertical"
    config_type: ClassVar[type] = VerticalConfig
    prefix_decodable: ClassVar[bool] = True

    def __init__(self, modes: Sequence[Mode], config: VerticalConfig | None = None) -> None:
        super().__init__(modes, config)
        self.highest_bits = max(mode.weight_bits for mode in self.modes)

    def passes(self, skip: Collection[str]) -> list[Pass]:
        """Quantise the layers between the first and the last, then split batch normalisation."""
        activation_bits = [mode.activation_bits for mode in self.modes]
        return [
            QuantizeLayers(
                weight_quantizer=lambda layer: VerticalWeightQuantizer(self.highest_bits, self.config),
                activation_quantizer=lambda signed: LsqActivationQuantizer(activation_bits, signed),
                skip=skip,
            ),
            SplitBatchNorm(len(self.modes), self.config.batch_norm),
        ]

    def mode_weights(self) -> tuple[float, ...] | None:
        """Equal weights, or None for the min-norm point."""
        return None if self.config.moo == "mgd" else super().mode_weights()

    @property
    def needs_logits(self) -> bool:
        """Distillation compares outputs."""
        return self.config.distillation is not None

    def mode_loss(
        self,
        row: int,
        task_loss: Callable[[], Tensor],
        logits: Tensor | None,
        earlier: Mapping[int, Tensor],
        teacher: Tensor | None,
    ) -> Tensor:
        """Task loss plus the distance to the next higher mode (Eq. 11); a float teacher guides every mode.

        The paper uses no teacher from outside. If there is one, KL(teacher || mode) is added for each mode.
        """
        loss = task_loss()
        guides = [(self.config.distillation, earlier.get(row + 1)), ("kl", teacher)]
        for kind, guide in guides:
            if kind is not None and guide is not None:
                if logits is None:
                    raise InvalidArgument("distillation needs the logits of every mode")
                loss = loss + distillation_loss(kind, guide, logits)
        return loss
