"""MBQuant: several 2-bit copies of the network's body, of which a mode runs as many as its bits ask for.

"MBQuant: A Novel Multi-Branch Topology Method for Arbitrary Bit-width Network Quantization". A mode of b bits
runs b / 2 branches, for odd b half a branch less, on activations of b bits, and combines their outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from torch import Tensor

from qcompile.errors import InvalidArgument

from ..batchnorm import BatchNormVariant, SplitBatchNorm
from ..branches import Selection, SplitBranches
from ..distillation import soft_cross_entropy
from ..half_layers import TieHalves
from ..manager import Pass
from ..quantize_layers import QuantizeLayers
from ..range_quantizers import RangeActivationQuantizer, RangeWeightQuantizer
from .base import Scheme, choice

#: Bits of every branch's weights (Sec. 3.3).
BRANCH_BITS = 2


@dataclass(frozen=True)
class MultiBranchConfig:
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
    """

    selection: Literal["amortised", "serial"] = "amortised"
    combine: Literal["mean", "sum"] = "mean"
    distillation: bool = True
    loss: Literal["mean", "sum"] = "mean"
    batch_norm: BatchNormVariant = "full"
    noise: float = 0.2
    quantizer_lr: float = 0.01

    def __post_init__(self) -> None:
        choice("selection", self.selection, ("amortised", "serial"))
        choice("combine", self.combine, ("mean", "sum"))
        choice("distillation", self.distillation, (True, False))
        choice("loss", self.loss, ("mean", "sum"))
        choice("batch_norm", self.batch_norm, ("full", "stats", "shared"))
        for name in ("noise", "quantizer_lr"):
            if not getattr(self, name) >= 0:
                raise InvalidArgument(f"{name}={getattr(self, name)!r} must not be negative")


def select_branches(bits: Sequence[int], amortised: bool) -> tuple[Selection, ...]:
    """Which branches each of several modes runs (Sec. 3.4 and Table 1).

    Low modes choose first, and the least loaded branches, ties to the lowest number; the load of a branch is
    the sum of 4^-b over the modes of lower bits that run it whole. An odd mode of b bits sees what mode b - 1
    would see, takes its whole branches from all but the last one, and half of the branch behind them.

    Args:
        bits: weight bits of every mode, not decreasing.
        amortised: by load; else the first ones.
    """
    count = (max(bits) + 1) // 2
    chosen: dict[int, Selection] = {}
    for width in dict.fromkeys(bits):
        odd = width % 2
        candidates = range(1, count + 1 - odd)
        load = dict.fromkeys(candidates, Fraction(0))
        for lower, selection in chosen.items():
            for branch in selection.full:
                if amortised and lower < width - odd and branch in load:
                    load[branch] += Fraction(1, 4**lower)
        order = sorted(candidates, key=lambda branch: (load[branch], branch))
        full = tuple(sorted(order[: width // 2]))
        chosen[width] = Selection(full, full[-1] + 1 if odd else None)
    return tuple(chosen[width] for width in bits)


class MultiBranchScheme(Scheme):
    """Branches of 2-bit weights with learned bounds; stem and classifier are shared and float."""

    name: ClassVar[str] = "multibranch"
    config_type: ClassVar[type] = MultiBranchConfig
    default_bits: ClassVar[tuple[int, ...]] = (2, 4, 6, 8)

    @property
    def quantizer_lr_factor(self) -> float:
        """Of the bounds."""
        factor: float = self.config.quantizer_lr
        return factor

    def passes(self, skip: Collection[str]) -> list[Pass]:
        """Copy the body, quantise every copy, split batch normalisation.

        Raises:
            InvalidArgument: for a mode of less than 2 bits.
        """
        config: MultiBranchConfig = self.config
        widths = [mode.weight_bits for mode in self.modes]
        if min(widths) < BRANCH_BITS:
            raise InvalidArgument(
                f"scheme 'multibranch' has no mode of {min(widths)} bits: a branch has {BRANCH_BITS}"
            )
        selections = select_branches(widths, config.selection == "amortised")
        activation_bits = [mode.activation_bits for mode in self.modes]
        return [
            SplitBranches(selections, config.combine, config.noise),
            QuantizeLayers(
                weight_quantizer=lambda layer: RangeWeightQuantizer(BRANCH_BITS),
                activation_quantizer=lambda signed: RangeActivationQuantizer(activation_bits),
                skip=skip,
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
        return distils

    def mode_loss(
        self,
        row: int,
        task_loss: Callable[[], Tensor],
        logits: Tensor | None,
        earlier: Mapping[int, Tensor],
        teacher: Tensor | None,
    ) -> Tensor:
        """The task's loss, and below the highest mode soft cross-entropy to it, too (Sec. 3.5).

        The paper uses no teacher from outside. If there is one, it guides the highest mode in the same way.
        """
        guide = teacher if row == len(self.modes) - 1 else earlier.get(len(self.modes) - 1)
        if guide is None or not (self.config.distillation or guide is teacher):
            return task_loss()
        if logits is None:
            raise InvalidArgument("distillation needs the logits of every mode")
        loss = task_loss() + soft_cross_entropy(guide, logits)
        return loss * 0.5 if self.config.loss == "mean" else loss
