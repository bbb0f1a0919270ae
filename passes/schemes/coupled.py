"""Weight coupling: one weight under a learned step for every bit-width, trained under random policies.

Chen Tang et al., "Retraining-free Model Quantization via One-Shot Weight-Coupling Learning". Every layer has
weight bits and activation bits of its own; after training, a search picks them for any budget.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from qcompile.errors import InvalidArgument
from qcompile.modes import Mode

from ..bit_candidates import AddBitCandidates
from ..bit_schedule import Form
from ..distillation import divergence
from ..lsq import LsqActivationQuantizer
from ..lsq_weights import LsqWeightQuantizer
from ..manager import Pass
from ..quantize_layers import LayerQuantizers, QuantizeLayers
from ..split_batchnorm import SplitBatchNorm
from .base import ModeOutput, Scheme, SchemeConfig, choice, number

#: Bits of the first and the last layers.
ENDS: Final = 8

#: What the highest policy's probabilities and the task share of a random policy's loss (Sec. 4.1).
HALF = 0.5


@dataclass(frozen=True)
class CoupledConfig(SchemeConfig):
    """Options of weight coupling; the defaults are the paper's.

    Attributes:
        random_policies: drawn for every training step, besides the highest policy (K - 1 of Eq. 2).
        schedule: take their smallest candidate from the layers with the most weights near rounding bounds
            (Sec. 3.3); it goes by `joint.epoch(e, epochs)`.
        unstable: how a layer's bit-widths add up to its criterion: `paper` as in Eq. 6, `code` as in what the
            authors published.
        distortion: weight of information distortion mitigation (Sec. 3.4); 0 leaves it out.
        rectified: compare what is positive of the normalised outputs, as the paper prints; the authors' code
            compares all of it.
        distillation: `kl` for half the divergence from the highest policy and half the task's loss, None for
            the task's loss alone.
        fairness: no weight decay for what a random policy used at the smallest bits (Sec. 3.4); needs
            `JointLoss(optimizer=...)`.
        depthwise: weight candidates of depthwise convolutions, among the model's; None for all but 2, which
            the authors never use there.
        first_last: what becomes of the first and the last layers: 8 for 8 bits in every mode at learned
            steps, as in the paper; `float`; or `int8`, see `SchemeConfig`.
        scaled_gradient: scale the gradients of steps as LSQ does. The authors' code does not, and trains
            steps with Adam, to which a constant factor makes no difference.
        seed: of the random policies.
    """

    random_policies: int = 3
    schedule: bool = True
    unstable: Form = "paper"
    distortion: float = 0.01
    rectified: bool = True
    distillation: Literal["kl"] | None = "kl"
    fairness: bool = True
    depthwise: tuple[int, ...] | None = None
    scaled_gradient: bool = True
    seed: int = 0
    ends: ClassVar[tuple[str | int, ...]] = ("float", ENDS, "int8")
    first_last: Literal["float", "int8", 8] = field(default=ENDS, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("schedule", "rectified", "fairness", "scaled_gradient"):
            choice(name, getattr(self, name), (True, False))
        choice("unstable", self.unstable, ("paper", "code"))
        choice("distillation", self.distillation, ("kl", None))
        number("distortion", self.distortion)
        for name, least in (("random_policies", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidArgument(f"{name}={value!r} is not a whole number of at least {least}")


class CoupledScheme(Scheme):
    """LSQ with a step per bit-width; every pair of weight and activation bits is a mode."""

    name: ClassVar[str] = "coupled"
    config_type: ClassVar[type] = CoupledConfig
    default_bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 5, 6)
    without_logits: ClassVar[str] = "CoupledConfig(distillation=None)"

    def __init__(self, modes: Sequence[Mode], config: Any = None) -> None:
        super().__init__(modes, config)
        weight_bits = sorted({mode.weight_bits for mode in self.modes})
        activation_bits = sorted({mode.activation_bits for mode in self.modes})
        self.modes = tuple(itertools.starmap(Mode, itertools.product(weight_bits, activation_bits)))
        own = self.config.depthwise
        if own is not None and not (own and set(own) <= set(weight_bits)):
            raise InvalidArgument(f"depthwise={own!r} is not among the weight bits {tuple(weight_bits)}")
        self._depthwise = sorted(own or ({*weight_bits} - {2} or weight_bits))

    @property
    def random_policies(self) -> int:
        """Drawn for every step."""
        count: int = self.config.random_policies
        return count

    @property
    def compares_normalised(self) -> bool:
        """For information distortion mitigation."""
        return bool(self.config.distortion)

    def passes(self, skip: Collection[str]) -> list[Pass]:
        """Quantise all layers, split batch normalisation by pairs of bits, note every layer's candidates."""
        activation_bits = [mode.activation_bits for mode in self.modes]
        eights = [ENDS] * len(self.modes)
        ends = LayerQuantizers(
            lambda layer: LsqWeightQuantizer(eights, self.config.scaled_gradient),
            lambda signed: self._activation(eights, signed),
        )
        quantize = QuantizeLayers(
            lambda layer: LsqWeightQuantizer(self._weight_bits(layer), self.config.scaled_gradient),
            lambda signed: self._activation(activation_bits, signed),
            skip=skip,
            first_last=ends if self.config.first_last == ENDS else self.calibrated_ends(shared=True),
        )
        split = SplitBatchNorm(len(self.modes), "full", activation_bits)
        return [quantize, split, AddBitCandidates(activation_bits)]

    def _activation(self, bits: Sequence[int], signed: bool) -> LsqActivationQuantizer:
        return LsqActivationQuantizer(bits, signed, True, "mean", self.config.scaled_gradient)

    def _weight_bits(self, layer: nn.Module) -> list[int]:
        """Of every mode: those of the mode, or the layer's next candidate."""
        given = [mode.weight_bits for mode in self.modes]
        if not _is_depthwise(layer):
            return given
        return [next((one for one in self._depthwise if one >= bits), self._depthwise[-1]) for bits in given]

    def training_order(self) -> tuple[int, ...]:
        """The highest mode alone; random policies follow it."""
        return (len(self.modes) - 1,)

    def mode_weights(self) -> Sequence[float]:
        """Gradients of the highest and of the random policies add up (Eq. 2)."""
        return (1.0,) * len(self.modes)

    @property
    def needs_logits(self) -> bool:
        """Distillation compares outputs."""
        return self.config.distillation is not None

    def mode_loss(self, row: int, output: ModeOutput) -> Tensor:
        """The task's loss; a float teacher, if there is one, takes half of it."""
        return self._guided(output, output.teacher)

    def policy_loss(self, output: ModeOutput) -> Tensor:
        """Half the task's loss and half the divergence from the highest mode, plus the distortion (Eq. 8)."""
        loss = self._guided(output, output.earlier.get(len(self.modes) - 1))
        if output.normalised:
            loss = loss + self.config.distortion * distortion(output.normalised, self.config.rectified)
        return loss

    def _guided(self, output: ModeOutput, guide: Tensor | None) -> Tensor:
        if guide is None or self.config.distillation is None:
            return output.task_loss()
        return HALF * output.task_loss() + HALF * output.distance(guide, divergence)


def distortion(pairs: Sequence[tuple[Tensor, Tensor]], rectified: bool) -> Tensor:
    """Information distortion mitigation (Eq. 8): how far outputs are from those of the highest policy.

    Args:
        pairs: (N, C, ...) outputs of a random policy and of the highest one, of batch normalisation behind
            each layer that runs at its smallest bits.
        rectified: compare what is positive of them.

    Returns:
        The sum over the pairs of the mean squared difference, shape ().
    """
    errors = []
    for found, wanted in pairs:
        ends = [one.to(torch.promote_types(one.dtype, torch.float32)) for one in (found, wanted.detach())]
        if rectified:
            ends = [one.clamp_min(0.0) for one in ends]
        errors.append(functional.mse_loss(ends[0], ends[1]))
    return torch.stack(errors).sum()


def _is_depthwise(layer: nn.Module) -> bool:
    groups = getattr(layer, "groups", 1)
    return isinstance(groups, int) and groups > 1 and groups == getattr(layer, "in_channels", None)
