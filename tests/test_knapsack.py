"""The exact search on quantisation error against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import trained

from qcompile.costs import LayerCost
from qcompile.errors import InvalidArgument
from qcompile.modes import Mode
from qcompile.policy import Policy
from qcompile.policy_costs import PolicyCosts, SearchedLayer, policy_costs
from qcompile.search.budget import parse_budget
from qcompile.search.knapsack import least_error, weight_errors

torch.set_num_threads(1)

UNIFORM = tuple(Mode(b, b) for b in (2, 3, 4))
GRID = tuple(Mode(w, a) for w in (2, 4) for a in (2, 3, 8))


@st.composite
def instances(draw):
    """Up to 6 layers, some of which read one tensor, with random costs and errors."""
    modes = draw(st.sampled_from([UNIFORM, GRID]))
    count = draw(st.integers(1, 6 if modes is UNIFORM else 4))
    ends = sorted(draw(st.sets(st.integers(1, count - 1)))) if count > 1 else []
    names = [f"layer{i}" for i in range(count)]
    groups = [names[a:b] for a, b in itertools.pairwise([0, *ends, count])]
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = numbers.choice([1, 7, 64, 1000, 10**6], count)
    # some layers lack the lowest weight bits, as depthwise ones may
    high = tuple(mode for mode in modes if mode.weight_bits > modes[0].weight_bits)
    own = {name: modes if numbers.random() < 0.8 else high for name in names}
    layers = tuple(
        SearchedLayer(
            name, int(sizes[int(name[5:])]) * 9, int(sizes[int(name[5:])]), True, tuple(group), own[name]
        )
        for group in groups
        for name in group
    )
    scale = 10.0 ** numbers.uniform(-6, 6)
    errors = {}
    for name in names:
        by_bits = dict(zip((8, 4, 3, 2), np.cumsum([0.0, *numbers.random(3)]) * scale, strict=True))
        errors[name] = {mode: float(by_bits[mode.weight_bits]) for mode in modes}
    costs = PolicyCosts(modes, layers, (LayerCost("stem", 8, 8, 100, 50),))
    kind = draw(st.sampled_from(["bitops", "size"]))
    least, most = costs.bounds(kind)
    limit = draw(st.integers(least, most))
    return costs, errors, f"{kind}<={limit}{'B' if kind == 'size' else ''}", kind, limit


@given(instances())
@settings(max_examples=60, deadline=None)
def test_the_result_is_that_of_brute_force(instance):
    costs, errors, text, kind, limit = instance
    names = [one.name for one in costs.layers]
    policies = [
        Policy(dict(zip(names, chosen, strict=True)))
        for chosen in itertools.product(*(one.modes for one in costs.layers))
    ]

    def error(policy):
        return sum(errors[name][mode] for name, mode in policy.items)

    best = min(error(one) for one in policies if costs.total(one, kind) <= limit)
    found = least_error(costs, errors, parse_budget(text, costs))
    assert costs.total(found, kind) <= limit
    assert error(found) == pytest.approx(best, rel=1e-6, abs=1e-12)


def test_equal_errors_leave_more_activation_bits():
    layers = tuple(SearchedLayer(name, 10, 10, True, (name,), GRID) for name in ("a", "b"))
    costs = PolicyCosts(GRID, layers)
    errors = {name: {mode: 4.0 - mode.weight_bits for mode in GRID} for name in ("a", "b")}
    # 4 x 8 x 10 and 4 x 3 x 10
    found = least_error(costs, errors, parse_budget("bitops<=440", costs))
    assert sorted(mode.label for _, mode in found.items) == ["w4a3", "w4a8"]


def test_errors_are_the_distance_of_the_rounded_weights():
    model, _ = trained("residual")
    costs = policy_costs(model.eval())
    errors = weight_errors(model, costs)
    for layer in costs.layers:
        module = model.get_submodule(layer.name)
        highest = module.weight_quantizer.codes(module.weight, 2)
        lowest = module.weight_quantizer.codes(module.weight, 0)
        values = [
            one.scale.double().reshape(-1, 1, 1, 1).numpy()
            * (one.codes.double().numpy() + one.offset_numerator * 2.0**-one.offset_shift)
            for one in (lowest, highest)
        ]
        expected = float(np.square(values[0] - values[1]).sum())
        assert errors[layer.name][Mode(2, 2)] == pytest.approx(expected, rel=1e-4)
        assert errors[layer.name][Mode(4, 4)] == 0.0


def test_weights_that_are_no_numbers_are_refused():
    costs = PolicyCosts(UNIFORM, (SearchedLayer("a", 1, 1, True, ("a",), UNIFORM),))
    with pytest.raises(InvalidArgument, match="NaN"):
        least_error(costs, {"a": dict.fromkeys(UNIFORM, float("nan"))}, parse_budget("bitops<=9", costs))
