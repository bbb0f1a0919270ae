"""Bidirectional greedy search: one layer's bits change at a time, up or down.

Chen Tang et al., "Retraining-free Model Quantization via One-Shot Weight-Coupling Learning", Sec. 3.5, Eq. 9:
of all policies that are one step away from the current one, the next is that with the least
minmax(loss) + lambda minmax(cost), until the budget holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar

from qcompile.errors import InvalidArgument
from qcompile.modes import Mode
from qcompile.policy import Policy
from qcompile.policy_costs import PolicyCosts, SearchedLayer

from .budget import Budget

#: Which bits a round may change.
Moves = Literal["weights", "activations", "both"]

#: Where a search begins.
Start = Literal["highest", "nearest"]

Losses = Callable[[Policy, Sequence[Policy]], Sequence[float]]
Told = Callable[[Policy, float, float], None]


def greedy(
    costs: PolicyCosts,
    losses: Losses,
    budget: Budget,
    trade: float = 1.5,
    on_loss: bool = False,
    weights_first: bool = True,
    told: Told = lambda *_: None,
    start: Policy | None = None,
) -> Policy:
    """The first policy within the budget, from the highest uniform one.

    Args:
        costs: of the model's policies.
        losses: losses(current, candidates) of every candidate.
        budget: which some policy satisfies.
        trade: lambda.
        on_loss: lambda weighs the loss instead of the cost, as in the authors' code.
        weights_first: where weight and activation bits are independent, weight bits change first, until they
            have taken their equal share of what the cost must fall by or cannot fall any more; without, both
            in every round.
        told: told(policy, loss, cost) after every round.
        start: another policy to begin with.

    Raises:
        InvalidArgument: if every way ends outside of the budget.
    """
    current = costs.uniform(costs.modes[-1]) if start is None else start
    visited = {current}
    fixed = costs.fixed_total(budget.kind)
    highest = costs.total(current, budget.kind) - fixed
    halfway = fixed + math.sqrt(highest * max(0.0, budget.limit - fixed))
    while (cost := costs.total(current, budget.kind)) > budget.limit:
        moves: list[Moves] = ["both"]
        if weights_first and not costs.is_tied:
            moves = ["weights", "activations"] if cost > halfway else ["activations", "weights"]
        spending: dict[Policy, float] = {}
        for kind in moves:
            beside = [one for one in neighbours(current, costs, kind) if one not in visited]
            spending_beside = {one: costs.total(one, budget.kind) for one in beside}
            if any(one < cost for one in spending_beside.values()):
                spending = spending_beside
                break
            spending |= spending_beside  # none is cheaper: bits of this kind are as low as they go
        if not spending:
            raise InvalidArgument(f"greedy search found no policy within {budget.text!r}; try another method")
        found, spent = list(spending), list(spending.values())
        measured = losses(current, found)
        factors = (trade, 1.0) if on_loss else (1.0, trade)
        scores = [
            factors[0] * a + factors[1] * b for a, b in zip(minmax(measured), minmax(spent), strict=True)
        ]
        best = min(range(len(found)), key=scores.__getitem__)  # of equal ones the first
        current = found[best]
        visited.add(current)
        told(current, measured[best], spent[best])
    return current


def starting_policy(costs: PolicyCosts, losses: Losses, budget: Budget, start: Start) -> Policy:
    """The highest uniform policy, or the cheapest above the budget with less loss than all cheaper ones."""
    uniform = [costs.uniform(mode) for mode in costs.modes]
    if start == "nearest":
        least = math.inf
        by_loss = dict(zip(uniform, losses(uniform[-1], uniform), strict=True))
        for one in sorted(uniform, key=lambda policy: costs.total(policy, budget.kind)):
            if by_loss[one] < least and costs.total(one, budget.kind) > budget.limit:
                return one
            least = min(least, by_loss[one])
    return uniform[-1]


def minmax(values: Sequence[float]) -> list[float]:
    """Values between 0 and 1; all 0 where none differs."""
    low, span = min(values), max(values) - min(values)
    return [(one - low) / span if span > 0 else 0.0 for one in values]


def neighbours(policy: Policy, costs: PolicyCosts, moves: Moves) -> list[Policy]:
    """Policies in which one layer is one step up or down, in the order of the layers' names, up first.

    Layers that read one tensor change its activation bits together.
    """
    given, found = policy.layers, list[dict[str, Mode]]()
    for layer in sorted(costs.layers, key=lambda one: one.name):
        current = given[layer.name]
        ordered = [
            one for one in layer.modes if costs.is_tied or one.activation_bits == current.activation_bits
        ]
        if costs.is_tied or moves != "activations":
            found += [{layer.name: one} for one in _beside(current, ordered)]
        first = min(layer.shares) == layer.name
        if not costs.is_tied and moves != "weights" and first:
            found += _activation_steps(given, layer, costs)
    return [Policy({**given, **changed}) for changed in found]


def _activation_steps(
    given: Mapping[str, Mode], layer: SearchedLayer, costs: PolicyCosts
) -> list[dict[str, Mode]]:
    levels = sorted({mode.activation_bits for mode in costs.modes})
    candidates = {one.name: one.modes for one in costs.layers}
    bits = max(given[name].activation_bits for name in layer.shares)
    found = []
    for one in _beside(bits, levels):
        changed = {name: Mode(given[name].weight_bits, one) for name in layer.shares}
        if all(mode in candidates[name] for name, mode in changed.items()):
            found.append(changed)
    return found


Step = TypeVar("Step")


def _beside(current: Step, ordered: Sequence[Step]) -> list[Step]:
    place = list(ordered).index(current)
    return [ordered[one] for one in (place + 1, place - 1) if 0 <= one < len(ordered)]
