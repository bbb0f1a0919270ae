"""What one training step runs: the scheme's modes in their order, and random policies if it trains such."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import InvalidArgument
from .fair_decay import FairDecay
from .modes import Mode
from .policy import Policy
from .prepared import Prepared
from .random_policies import RandomPolicies


@dataclass(frozen=True)
class Turn:
    """One forward and backward of a training step.

    Attributes:
        label: what the joint loss calls its loss.
        precision: what runs.
        row: of the mode; None for a random policy.
        weight: alpha of its loss; 1 where the weights are solved for.
    """

    label: int | str
    precision: Mode | Policy
    row: int | None
    weight: float


class TrainingTurns:
    """Gives every training step its turns.

    Args:
        model: from `prepare`.
        optimizer: of its weights, or None; see `JointLoss`.

    Attributes:
        labels: of the turns, modes in increasing order.

    Raises:
        InvalidInputType: if the optimiser is none.
    """

    def __init__(self, model: Prepared, optimizer: Any) -> None:
        self.scheme, self._modes = model.scheme, model.prepared_modes
        self._policies = RandomPolicies(model) if self.scheme.random_policies else None
        self._decay = None
        if self._policies is not None and optimizer is not None and self.scheme.config.fairness:
            self._decay = FairDecay(optimizer, self._policies)
        labels = [self._modes[row].label for row in sorted(self.scheme.training_order())]
        self._random = tuple(f"random {number + 1}" for number in range(self.scheme.random_policies))
        self.labels: tuple[int | str, ...] = (*labels, *self._random)

    def of_step(self) -> list[Turn]:
        """What the next step runs, teachers before students.

        Raises:
            InvalidArgument: where a compiler would make the random policies of one step those of all.
        """
        weights = self.scheme.mode_weights() or (1.0,) * len(self._modes)
        modes = [(row, self._modes[row]) for row in self.scheme.training_order()]
        turns = [Turn(mode.label, mode, row, weights[row]) for row, mode in modes]
        if self._policies is None:
            return turns
        if torch.compiler.is_compiling():
            raise InvalidArgument(
                "random policies are drawn anew in every step, which a compiled joint loss could not: "
                "compile the model and pass that to JointLoss"
            )
        drawn = zip(self._random, self._policies.draw(len(self._random)), strict=True)
        return turns + [Turn(label, policy, None, 1.0) for label, policy in drawn]

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """See `JointLoss.epoch`."""
        if self._policies is not None:
            self._policies.begin_epoch(epoch, epochs)

    def pairs(
        self, policy: Mode | Policy, normalised: Mapping[int, Tensor], of_highest: Mapping[int, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """What a policy normalised, and the highest mode, behind the layers at their smallest weight bits.

        Args:
            policy: a random one, which has run.
            normalised: its outputs of batch normalisation, see `ActiveMode`.
            of_highest: those of the highest mode.
        """
        assert self._policies is not None
        assert isinstance(policy, Policy)
        smallest = self._policies.at_smallest(policy)
        if self._decay is not None:
            given = policy.layers
            self._decay.note({name: given[name].weight_bits for name in smallest})
        behind = [id(one) for one in self._policies.normalisations_of(smallest)]
        return [(normalised[one], of_highest[one]) for one in behind if one in normalised]
