"""Costs of policies: by their definition, and as conversion measures them."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from nets import example, trained
from torch import Tensor, nn

import qcompile
from qcompile.costs import layer_costs
from qcompile.errors import InvalidArgument
from qcompile.modes import Mode
from qcompile.passes.schemes.vertical import VerticalConfig
from qcompile.policy_costs import KINDS, policy_costs
from qcompile.search.budget import parse_budget

torch.set_num_threads(1)


class Shared(nn.Module):
    """Three layers read one tensor, (N, 6) to (N, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(9, 2)
        self.branches = nn.ModuleList(nn.Linear(8, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.cat([torch.relu(one(x)) for one in self.branches], 1))


def _prepared(network, x, **options):
    model = qcompile.prepare(network, x, **options)
    qcompile.calibrate(model, [x])
    return model.eval()


def _policy(costs, seed):
    chosen = random.Random(seed)
    return qcompile.Policy({one.name: chosen.choice(costs.modes) for one in costs.layers})


@pytest.mark.parametrize("name", ["residual", "mobile", "dense"])
def test_costs_are_those_of_the_converted_policy(name):
    model, x = trained(name)
    model.eval()
    costs = policy_costs(model)
    for seed in range(3):
        policy = qcompile.calibrate(model, [x], policy=_policy(costs, seed))
        measured = {one.name: one for one in layer_costs(qcompile.convert(model, policy), [x.shape])}
        found = {one.name: one for one in costs.of(policy)}
        assert found.keys() == measured.keys()
        for layer in costs.layers:
            assert found[layer.name] == measured[layer.name]


def test_bitops_are_by_the_papers_definition():
    model, _ = trained("residual")
    costs = policy_costs(model.eval())
    policy = qcompile.Policy({"conv1": 2, "conv2": 3, "down": 4, "conv3": 2})
    macs = {one.name: one.macs for one in (*costs.layers, *costs.fixed)}
    expected = 4 * macs["conv1"] + 9 * macs["conv2"] + 16 * macs["down"] + 4 * macs["conv3"]
    shared = {one.name: one.shares for one in costs.layers}
    if "down" in shared["conv1"]:
        expected += (2 * 4 - 4) * macs["conv1"]
    assert costs.total(policy, "bitops") == expected + 64 * (macs["stem"] + macs["head"])


def test_layers_that_share_a_tensor_count_at_its_bits():
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    model = _prepared(Shared(), x, modes=("w2a2", "w2a4", "w4a2", "w4a4"))
    costs = policy_costs(model)
    policy = qcompile.Policy({"branches.0": "w2a2", "branches.1": "w4a2", "branches.2": "w2a4"})
    assert [(one.weight_bits, one.activation_bits) for one in costs.of(policy)[2:]] == [
        (2, 4),
        (4, 4),
        (2, 4),
    ]
    for kind in KINDS:
        totals = [
            costs.total(qcompile.Policy(dict(zip(policy.layers, chosen, strict=True))), kind)
            for chosen in itertools.product(costs.modes, repeat=3)
        ]
        assert costs.bounds(kind) == (min(totals), max(totals))


def test_layers_with_bits_of_their_own_are_left_out():
    network, x = example("residual")
    model = _prepared(network, x, bits=(2, 4), config=VerticalConfig(first_last=8))
    costs = policy_costs(model)
    assert [one.name for one in costs.layers] == ["conv1", "conv2", "down", "conv3"]
    assert {(one.name, one.weight_bits, one.activation_bits) for one in costs.fixed} == {
        ("stem", 8, 8),
        ("head", 8, 8),
    }
    policy = qcompile.calibrate(model, [x], policy=costs.uniform(Mode(4, 4)))
    assert qcompile.verify(model, x, bits=policy).exact


@pytest.mark.parametrize(
    ("text", "kind", "limit"),
    [
        ("bitops<=3M", "bitops", 3e6),
        (" bitops <= 3.5e6 ", "bitops", 3.5e6),
        ("size<=3KB", "size", 3000),
        ("size<=3KiB", "size", 3072),
        ("size<=3000B", "size", 3000),
    ],
)
def test_budgets_are_read(text, kind, limit):
    model, _ = trained("residual")
    budget = parse_budget(text, policy_costs(model.eval()))
    assert (budget.kind, budget.limit) == (kind, limit)


def test_budgets_as_fractions_of_the_highest_policy():
    model, _ = trained("residual")
    costs = policy_costs(model.eval())
    highest = costs.total(costs.uniform(costs.modes[-1]), "bitops")
    assert parse_budget("bitops<=0.75x", costs).limit == 0.75 * highest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bitops<=1", "below that of the smallest policy: policies of this model take"),
        ("size<=1GB", "above that of the largest policy: policies of this model take"),
        ("latency<=2ms", "a latency names its target"),
        ("size<=2kb", "the unit 'kb' is none of B, KB, MB, GB, KiB, MiB, GiB or x"),
        ("size<2KB", "not of the form"),
        ("size<=--KB", "is no number"),
    ],
)
def test_wrong_budgets_are_one_line(text, message):
    model, _ = trained("residual")
    with pytest.raises(InvalidArgument, match=message):
        parse_budget(text, policy_costs(model.eval()))
