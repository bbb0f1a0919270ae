"""The policy with the least quantisation error of the weights within a budget.

Hai Wu et al., "Vertical Layering of Quantized Neural Networks for Heterogeneous Inference", Eq. 12: choose
each layer's bits so that the sum of ||Q_b(W) - Q_K(W)||^2 is least, K the highest mode. It is a
multiple-choice knapsack, solved exactly by HiGHS through scipy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qcompile.errors import InvalidArgument, MissingExtra
from qcompile.model import QuantModel
from qcompile.modes import Mode
from qcompile.passes.layers import QuantizedLayer
from qcompile.passes.quantized_tensor import QuantizedTensor
from qcompile.policy import Policy
from qcompile.policy_costs import KINDS, PolicyCosts, SearchedLayer

from .budget import Budget

#: Rows and objectives reach this size, so that the solver's absolute tolerance of 1e-6 is a relative 1e-12.
SCALE = 1e6

Errors = Mapping[str, Mapping[Mode, float]]


@dataclass(frozen=True)
class _Choice:
    """One binary variable: a layer's mode, and the activation bits of what it reads."""

    group: int
    layer: SearchedLayer
    mode: Mode
    activation_bits: int


@torch.no_grad()
def weight_errors(model: QuantModel, costs: PolicyCosts) -> dict[str, dict[Mode, float]]:
    """||Q_b(W) - Q_K(W)||^2 of every layer and mode, by name."""
    found: dict[str, dict[Mode, float]] = {}
    for layer in costs.layers:
        module = model.get_submodule(layer.name)
        assert isinstance(module, (QuantizedLayer, QuantizedTensor))
        real = {
            mode: module.weight_quantizer(module.weight, model.row(mode)).double() for mode in costs.modes
        }
        highest = real[max(costs.modes, key=lambda mode: mode.weight_bits)]
        found[layer.name] = {mode: float((value - highest).square().sum()) for mode, value in real.items()}
    return found


def least_error(costs: PolicyCosts, errors: Errors, budget: Budget) -> Policy:
    """The policy with the least sum of errors; of several, the one with the most activation bits.

    Args:
        costs: of the model's policies.
        errors: by layer and mode, not negative.
        budget: which some policy satisfies.

    Raises:
        InvalidArgument: if an error is not finite.
        MissingExtra: without scipy.
    """
    if not all(np.isfinite(one) for of_layer in errors.values() for one in of_layer.values()):
        raise InvalidArgument("weights hold NaN or infinity, so that no policy is better than another")
    problem = _Problem(costs, budget)
    wanted = np.array([errors[one.layer.name][one.mode] for one in problem.choices])
    best = problem.solve(wanted)
    if len({mode.weight_bits for mode in costs.modes}) < len(costs.modes):
        spent = np.array([-float(one.activation_bits * max(1, one.layer.macs)) for one in problem.choices])
        kept = problem.solve(spent, at_most=(wanted, float(wanted @ best)))
        if wanted @ kept <= wanted @ best * (1 + 1e-9):
            best = kept
    return problem.policy(best)


class _Problem:
    """min c x over one choice for each layer, and one number of activation bits for each group."""

    def __init__(self, costs: PolicyCosts, budget: Budget) -> None:
        self.costs, self.budget = costs, budget
        levels = sorted({mode.activation_bits for mode in costs.modes})
        self.choices = [
            _Choice(index, layer, mode, bits)
            for index, group in enumerate(costs.groups())
            for layer in group
            for mode in layer.modes
            for bits in levels
            # alone, a layer has its own activation bits; with others, at least those
            if bits == mode.activation_bits or (len(group) > 1 and bits > mode.activation_bits)
        ]
        kind = KINDS[budget.kind]
        self._cost = np.array(
            [kind(one.layer.cost(one.mode.weight_bits, one.activation_bits)) for one in self.choices]
        )
        self._left = budget.limit - costs.fixed_total(budget.kind)
        self._rows, self._sides = self._one_choice_each(levels)
        self._excluded: list[Any] = []

    def _one_choice_each(self, levels: Sequence[int]) -> tuple[Any, Any]:
        rows, sides = [], []
        for index, group in enumerate(self.costs.groups()):
            for layer in group:
                rows.append([float(one.layer is layer) for one in self.choices])
                sides.append(1.0)
            first, *others = group
            for layer in others:
                for bits in levels:
                    signs = {id(first): 1.0, id(layer): -1.0}
                    rows.append(
                        [
                            signs.get(id(one.layer), 0.0)
                            if one.group == index and one.activation_bits == bits
                            else 0.0
                            for one in self.choices
                        ]
                    )
                    sides.append(0.0)
        return np.array(rows, np.float64), np.array(sides)

    def solve(self, objective: Any, at_most: tuple[Any, float] | None = None) -> Any:
        """0 or 1 for every choice.

        Args:
            objective: (choices,), to be made least.
            at_most: (choices,) factors and the largest sum of those chosen.
        """
        try:
            from scipy.optimize import Bounds, LinearConstraint, milp
        except ImportError as cause:
            raise MissingExtra("the knapsack needs scipy: pip install 'qcompile[search]'") from cause
        limits = [LinearConstraint(self._rows, self._sides, self._sides)]
        limits.append(LinearConstraint(*_scaled(self._cost, self._left)))
        if at_most is not None:
            limits.append(LinearConstraint(*_scaled(*at_most)))
        scaled = objective * (SCALE / max(float(np.abs(objective).max()), 1e-300))
        while True:
            found = milp(
                scaled,
                integrality=np.ones(len(scaled)),
                bounds=Bounds(0, 1),
                constraints=limits,
                options={"mip_rel_gap": 0.0},
            )
            if found.x is None:
                raise InvalidArgument(f"no policy satisfies the budget {self.budget.text!r}")
            chosen = np.rint(found.x)
            if self.costs.total(self.policy(chosen), self.budget.kind) <= self.budget.limit:
                return chosen
            # within the solver's tolerance of the budget only
            limits.append(LinearConstraint(chosen, -np.inf, chosen.sum() - 1))

    def policy(self, chosen: Any) -> Policy:
        """What a solution says."""
        return self.costs.settled(
            {one.layer.name: one.mode for one, yes in zip(self.choices, chosen, strict=True) if yes}
        )


def _scaled(factors: Any, limit: float) -> tuple[Any, float, float]:
    """A row of factors and its bounds."""
    scale = SCALE / max(float(np.abs(factors).max()), 1e-300)
    return factors * scale, -np.inf, limit * scale
