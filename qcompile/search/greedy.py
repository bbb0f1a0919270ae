"""Bidirectional greedy search: one layer's bits change at a time, up or down.

Chen Tang et al., "Retraining-free Model Quantization via One-Shot Weight-Coupling Learning", Sec. 3.5, Eq. 9:
of all policies that are one step away from the current one, the next is that with the least
minmax(loss) + lambda minmax(cost), until the budget holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from qcompile.errors import InvalidArgument
from qcompile.modes import Mode
from qcompile.policy import Policy
from qcompile.policy_costs import PolicyCosts

from .budget import Budget

#: Which bits a round may change.
Moves = Literal["weights", "activations", "both"]

Losses = Callable[[Policy, Sequence[Policy]], Sequence[float]]
Told = Callable[[Policy, float, int], None]


def greedy(
    costs: PolicyCosts,
    losses: Losses,
    budget: Budget,
    trade: float = 1.5,
    on_loss: bool = False,
    weights_first: bool = True,
    told: Told = lambda *_: None,
) -> Policy:
    """The first policy within the budget, from the highest uniform one.

    Args:
        costs: of the model's policies.
        losses: losses(current, candidates) of every candidate.
        budget: which some policy satisfies.
        trade: lambda.
        on_loss: lambda weighs the loss instead of the cost, as in the authors' code.
        weights_first: where weight and activation bits are independent, weight bits change first, until they
            have taken their equal share of what the cost must fall by; without, both in every round.
        told: told(policy, loss, cost) after every round.

    Raises:
        InvalidArgument: if every way ends outside of the budget.
    """
    current = costs.uniform(costs.modes[-1])
    visited = {current}
    fixed = costs.fixed_total(budget.kind)
    highest = costs.total(current, budget.kind) - fixed
    halfway = fixed + math.sqrt(highest * max(0.0, budget.limit - fixed))
    while (cost := costs.total(current, budget.kind)) > budget.limit:
        moves: list[Moves] = ["both"]
        if weights_first and not _tied(costs.modes):
            moves = ["weights", "activations"] if cost > halfway else ["activations", "weights"]
        found: list[Policy] = []
        for kind in moves:
            found = found or [one for one in neighbours(current, costs.modes, kind) if one not in visited]
        if not found:
            raise InvalidArgument(f"greedy search found no policy within {budget.text!r}; try another method")
        measured = losses(current, found)
        spent = [costs.total(one, budget.kind) for one in found]
        factors = (trade, 1.0) if on_loss else (1.0, trade)
        scores = [
            factors[0] * a + factors[1] * b for a, b in zip(minmax(measured), minmax(spent), strict=True)
        ]
        best = min(range(len(found)), key=scores.__getitem__)  # of equal ones the first
        current = found[best]
        visited.add(current)
        told(current, measured[best], spent[best])
    return current


def minmax(values: Sequence[float]) -> list[float]:
    """Values between 0 and 1; all 0 where none differs."""
    low, span = min(values), max(values) - min(values)
    return [(one - low) / span if span > 0 else 0.0 for one in values]


def neighbours(policy: Policy, modes: Sequence[Mode], moves: Moves) -> list[Policy]:
    """Policies in which one layer is one step up or down, in the order of the layers, up first."""
    given = policy.layers
    return [
        Policy({**given, name: mode})
        for name, current in policy.items
        for mode in _steps(current, modes, moves)
    ]


def _steps(current: Mode, modes: Sequence[Mode], moves: Moves) -> list[Mode]:
    if _tied(modes):
        place = list(modes).index(current)
        return [modes[one] for one in (place + 1, place - 1) if 0 <= one < len(modes)]
    found = []
    if moves != "activations":
        same = [one for one in modes if one.activation_bits == current.activation_bits]
        found += _beside(current, sorted(same, key=lambda one: one.weight_bits))
    if moves != "weights":
        same = [one for one in modes if one.weight_bits == current.weight_bits]
        found += _beside(current, sorted(same, key=lambda one: one.activation_bits))
    return found


def _beside(current: Mode, ordered: Sequence[Mode]) -> list[Mode]:
    place = list(ordered).index(current)
    return [ordered[one] for one in (place + 1, place - 1) if 0 <= one < len(ordered)]


def _tied(modes: Sequence[Mode]) -> bool:
    """Whether weight bits determine activation bits and the other way round."""
    return (
        len({one.weight_bits for one in modes}) == len(modes) == len({one.activation_bits for one in modes})
    )
