"""Evolutionary search: policies within the budget, mixed and changed at random, the better ones kept."""

from __future__ import annotations

import random
from collections.abc import Sequence

from qcompile.policy import Policy
from qcompile.policy_costs import PolicyCosts

from .budget import Budget
from .greedy import Losses, Told, neighbours

#: Policies of a generation, those of them that live on, and generations.
POPULATION, SURVIVORS, GENERATIONS = 24, 8, 12

#: Tries to find a policy within the budget that was not seen before.
TRIES = 200


def evolve(
    costs: PolicyCosts, losses: Losses, budget: Budget, seed: int, told: Told = lambda *_: None
) -> Policy:
    """The policy with the least loss that was seen.

    Args:
        costs: of the model's policies.
        losses: losses(base, candidates) of every candidate.
        budget: which some policy satisfies.
        seed: of everything that is drawn.
        told: told(policy, loss, cost) of the best, after every generation.
    """
    chance = random.Random(seed)
    known: dict[Policy, float] = {}
    uniform = [costs.uniform(mode) for mode in reversed(costs.modes)]
    first = [one for one in uniform if costs.total(one, budget.kind) <= budget.limit]
    first.append(_within(costs, budget, uniform[0], chance))
    best, fresh = first[0], list(dict.fromkeys(first))
    fresh += _drawn(costs, budget, first, chance, dict.fromkeys(first, 0.0))
    for _ in range(GENERATIONS):
        known |= dict(zip(fresh, losses(best, fresh), strict=True))
        parents = sorted(known, key=known.__getitem__)[:SURVIVORS]  # stable: of equal ones the older
        best = parents[0]
        told(best, known[best], costs.total(best, budget.kind))
        fresh = _drawn(costs, budget, parents, chance, known)
        if not fresh:
            break
    return best


def _drawn(
    costs: PolicyCosts,
    budget: Budget,
    parents: Sequence[Policy],
    chance: random.Random,
    known: dict[Policy, float],
) -> list[Policy]:
    """New policies within the budget."""
    found: dict[Policy, None] = {}
    for _ in range(TRIES):
        one, other = chance.choice(parents).layers, chance.choice(parents).layers
        mixed = {name: chance.choice((mode, other[name])) for name, mode in one.items()}
        candidates = {one.name: one.modes for one in costs.layers}
        changed = {
            name: chance.choice(candidates[name]) if chance.random() < 2.0 / len(mixed) else mode
            for name, mode in mixed.items()
        }
        child = _within(costs, budget, costs.settled(changed), chance)
        if child not in known:
            found[child] = None
        if len(found) == POPULATION:
            break
    return list(found)


def _within(costs: PolicyCosts, budget: Budget, policy: Policy, chance: random.Random) -> Policy:
    """The policy, random layers of it lowered until the budget holds."""
    while (spent := costs.total(policy, budget.kind)) > budget.limit:
        steps = neighbours(policy, costs, "both")
        lower = [one for one in steps if costs.total(one, budget.kind) < spent]
        policy = chance.choice(lower) if lower else costs.extreme(budget.kind, min)
    return policy
