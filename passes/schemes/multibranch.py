"""MBQuant: several 2-bit copies of the network's body, of which a mode runs as many as its bits ask for.

"MBQuant: A Novel Multi-Branch Topology Method for Arbitrary Bit-width Network Quantization". A mode of b bits
runs b / 2 branches, for odd b half a branch less, on activations of b bits, and combines their outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from torch import Tensor

from qcompile.errors import InvalidArgument

from ..batchnorm import BatchNormVariant
from ..branches import Selection, SplitBranches
from ..distillation import soft_cross_entropy
from ..half_layers import TieHalves
from ..manager import Pass
from ..quantize_layers import QuantizeLayers
from ..range_quantizers import RangeActivationQuantizer, RangeWeightQuantizer
from ..split_batchnorm import SplitBatchNorm
from .base import ModeOutput, Scheme, SchemeConfig, choice, number


@dataclass(frozen=True)
class MultiBranchConfig(SchemeConfig):
    """Options of MBQuant; the defaults are the paper's, where it does not depend on random first weights.

    Attributes:
        selection: which branches a mode runs (Sec. 3.4): `amortised` spreads the modes' influence over the
            branches, `serial` takes the first ones.
        combine: outputs of branches are averaged (as in the authors' code) or added up (`sum`, Eq. 10).
        distillation: modes below the highest learn from its output, too (Sec. 3.5).
        loss: such a mode's loss is the mean of both parts (`mean`, as in the authors' code) or their sum
            (`sum`, as printed).
        batch_norm: what batch normalisation keeps per mode, in every branch.
        noise: standard deviation of what is added to copies of the float weights, relative to the weights'
            own; the paper's branches start from random weights, and copies that are always used together
            would stay equal.
        quantizer_lr: learning rate of the quantisers' bounds relative to that of the weights.
        branch_bits: weight bits of a branch (Sec. 3.3). A mode runs as many branches as its bits hold, and a
            half one if half of that is left over.
        half_share: share of a branch's multiplications in a half branch (Sec. 3.3).
        weight_deviations: standard deviations at which the bounds of weights start, as in the authors' code.
        activation_deviations: those of the normal variable that activations are the absolute values of, for
            their upper bound.
    """

    selection: Literal["amortised", "serial"] = "amortised"
    combine: Literal["mean", "sum"] = "mean"
    distillation: bool = True
    loss: Literal["mean", "sum"] = "mean"
    batch_norm: BatchNormVariant = "full"
    noise: float = 0.2
    quantizer_lr: float = 0.01
    branch_bits: int = 2
    half_share: float = 0.5
    weight_deviations: float = 3.0
    activation_deviations: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("selection", self.selection, ("amortised", "serial"))
        choice("combine", self.combine, ("mean", "sum"))
        choice("distillation", self.distillation, (True, False))
        choice("loss", self.loss, ("mean", "sum"))
        choice("batch_norm", self.batch_norm, ("full", "stats", "shared"))
        number("noise", self.noise)
        number("quantizer_lr", self.quantizer_lr)
        number("half_share", self.half_share, above=0.0, most=1.0)
        number("weight_deviations", self.weight_deviations, above=0.0)
        number("activation_deviations", self.activation_deviations, above=0.0)
        choice("branch_bits", self.branch_bits, tuple(range(1, 9)))


def select_branches(bits: Sequence[int], amortised: bool, branch_bits: int = 2) -> tuple[Selection, ...]:
    """Which branches each of several modes runs (Sec. 3.4 and Table 1).

    Low modes choose first, and the least loaded branches, ties to the lowest number; the load of a branch is
    the sum of 4^-b over the modes of lower bits that run it whole. A mode with a half branch chooses as it
    would without, from all branches but the last one, and takes half of the branch behind them.

    Args:
        bits: weight bits of every mode, not decreasing.
        amortised: by load; else the first ones.
        branch_bits: weight bits of a branch.

    Raises:
        InvalidArgument: for a mode with less bits than a branch, or that is no number of halves of one.
    """
    count = -(-max(bits) // branch_bits)
    chosen: dict[int, Selection] = {}
    for width in dict.fromkeys(bits):
        whole, left = divmod(width, branch_bits)
        if not whole or left * 2 not in (0, branch_bits):
            raise InvalidArgument(
                f"scheme 'multibranch' has no mode of {width} bits: a branch has {branch_bits}, and a "
                "mode runs one or more, and half of another at most"
            )
        candidates = range(1, count + (not left))
        load = dict.fromkeys(candidates, Fraction(0))
        for lower, selection in chosen.items():
            for branch in selection.full:
                if amortised and lower < width - left and branch in load:
                    load[branch] += Fraction(1, 4**lower)
        order = sorted(candidates, key=lambda branch: (load[branch], branch))
        full = tuple(sorted(order[:whole]))
        chosen[width] = Selection(full, full[-1] + 1 if left else None)
    return tuple(chosen[width] for width in bits)


class MultiBranchScheme(Scheme):
    """Branches of 2-bit weights with learned bounds; stem and classifier are shared and float."""

    name: ClassVar[str] = "multibranch"
    config_type: ClassVar[type] = MultiBranchConfig
    without_logits: ClassVar[str] = "MultiBranchConfig(distillation=False)"
    default_bits: ClassVar[tuple[int, ...]] = (2, 4, 6, 8)

    @property
    def quantizer_lr_factor(self) -> float:
        """Of the bounds."""
        factor: float = self.config.quantizer_lr
        return factor

    def passes(self, skip: Collection[str]) -> list[Pass]:
        """Copy the body, quantise every copy, split batch normalisation.

        Raises:
            InvalidArgument: for a mode that branches do not add up to.
        """
        config: MultiBranchConfig = self.config
        widths = [mode.weight_bits for mode in self.modes]
        selections = select_branches(widths, config.selection == "amortised", config.branch_bits)
        activation_bits = [mode.activation_bits for mode in self.modes]
        return [
            SplitBranches(selections, config.combine, config.noise, config.half_share),
            QuantizeLayers(
                weight_quantizer=lambda layer: RangeWeightQuantizer(
                    config.branch_bits, config.weight_deviations
                ),
                activation_quantizer=lambda signed: RangeActivationQuantizer(
                    activation_bits, config.activation_deviations
                ),
                skip=skip,
                first_last=self.calibrated_ends(),
                parameters=False,  # copies of the body would share them
            ),
            TieHalves(),
            SplitBatchNorm(len(self.modes), config.batch_norm),
        ]

    def mode_weights(self) -> Sequence[float]:
        """All losses add up (Algorithm 1)."""
        return (1.0,) * len(self.modes)

    @property
    def needs_logits(self) -> bool:
        """Distillation compares outputs."""
        distils: bool = self.config.distillation
        return distils and len(self.modes) > 1

    def mode_loss(self, row: int, output: ModeOutput) -> Tensor:
        """The task's loss, and below the highest mode soft cross-entropy to it, too (Sec. 3.5).

        The paper uses no teacher from outside. If there is one, it guides the highest mode in the same way.
        """
        highest = len(self.modes) - 1
        guide = output.teacher if row == highest else output.earlier.get(highest)
        if guide is None or not (self.config.distillation or row == highest):
            return output.task_loss()
        loss = output.task_loss() + output.distance(guide, soft_cross_entropy)
        return loss * 0.5 if self.config.loss == "mean" else loss
