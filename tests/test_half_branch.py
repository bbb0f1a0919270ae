"""The half branch of a body: which channels are kept together, its cost, and that it runs."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import tied_networks
import torch
import trunk_networks
from hypothesis import given
from hypothesis import strategies as st
from nets import NETWORKS, example
from sliced_run import SlicedRun
from torch import Tensor, fx, nn
from torch.nn import functional

from qcompile.errors import InvalidArgument
from qcompile.passes.body import Body, find_body
from qcompile.passes.capture import capture
from qcompile.passes.channel_groups import channel_groups
from qcompile.passes.channel_variables import Variables
from qcompile.passes.half_branch import HalfPlan, Narrow, ZeroPad, half_branch, plan_at_ratio


@cache
def published(network: str) -> tuple[fx.GraphModule, Body, tuple[tuple[int, ...], ...]]:
    """A network captured in evaluation mode without examples, its body, and the shape of two images."""
    build, shape = trunk_networks.PUBLISHED[network]
    torch.manual_seed(0)
    graph_module = capture(build().eval()).graph_module
    return graph_module, find_body(graph_module), ((2, *shape),)


@torch.no_grad()
def check_runs(graph_module: fx.GraphModule, body: Body, plan: HalfPlan, *inputs: Tensor) -> Tensor:
    """Run the plan, check its cost and the shape at the exit; returns the exit's value."""
    whole = SlicedRun(graph_module, HalfPlan({}, {}, {}, {}, {}, 1.0, 0, 0))
    whole.run(*inputs)
    sliced = SlicedRun(graph_module, plan)
    sliced.run(*inputs)
    assert sliced.macs == plan.macs
    assert sliced.values[body.exit].shape == whole.values[body.exit].shape
    if plan.ratio == 1.0:
        assert plan.macs == plan.full_macs
        assert not plan.edges
        assert torch.equal(sliced.values[body.exit], whole.values[body.exit])
    return sliced.values[body.exit]


@pytest.mark.parametrize("network", trunk_networks.PUBLISHED)
def test_half_branch_has_half_of_the_multiply_accumulates_and_runs(network: str) -> None:
    graph_module, body, shapes = published(network)
    plan = half_branch(graph_module, body, shapes)
    assert plan.macs / plan.full_macs == pytest.approx(0.5, abs=0.05)
    x = torch.randn(shapes[0])
    check_runs(graph_module, body, plan, x)
    groups = channel_groups(graph_module, body, shapes)
    check_runs(graph_module, body, plan_at_ratio(graph_module, groups, 1.0), x)


@given(
    cuts=st.tuples(*(st.lists(st.integers(1, 9), unique=True, max_size=4) for _ in range(2))),
    ratio=st.floats(0, 1),
)
def test_united_parts_keep_the_same_features(cuts: tuple[list[int], list[int]], ratio: float) -> None:
    variables = Variables()
    lists = []
    for inner in cuts:
        bounds = [0, *sorted(inner), 10]
        lists.append([variables.new(end - start) for start, end in itertools.pairwise(bounds)])
    variables.unite(*lists)
    assert variables.kept(lists[0], ratio) == variables.kept(lists[1], ratio) != ()
    variables.align(lists[0], 5)
    variables.unite(lists[0], lists[1][::-1])
    assert len({variables.kept(one, ratio) for one in (*lists, lists[1][::-1])}) == 1


@pytest.mark.parametrize("network", NETWORKS)
def test_small_networks_run_at_every_ratio(network: str) -> None:
    model, x = example(network)
    check_every_ratio(capture(model.eval()).graph_module, x)


@pytest.mark.parametrize("network", tied_networks.TIED)
def test_operators_that_tie_channels_in_other_ways(network: str) -> None:
    build, shape = tied_networks.TIED[network]
    x = torch.randn(2, *shape)
    check_every_ratio(capture(build().eval(), x).graph_module, x)


def check_every_ratio(graph_module: fx.GraphModule, x: Tensor) -> None:
    body = find_body(graph_module)
    groups = channel_groups(graph_module, body, [x.shape])
    macs = []
    for ratio in (0.0, 0.4, 0.6, 0.8, 1.0):
        plan = plan_at_ratio(graph_module, groups, ratio)
        check_runs(graph_module, body, plan, x)
        macs.append(plan.macs)
    assert macs == sorted(macs)
    assert macs[0] < macs[-1]


def nodes_by_path(plan: HalfPlan) -> dict[str, Any]:
    return {str(node.target): one for node, one in (*plan.layers.items(), *plan.norms.items())}


def planned(network: str, ratio: float) -> tuple[HalfPlan, dict[str, Any]]:
    graph_module, body, shapes = published(network)
    plan = plan_at_ratio(graph_module, channel_groups(graph_module, body, shapes), ratio)
    return plan, nodes_by_path(plan)


def test_widths_of_resnet20_at_three_quarters() -> None:
    plan, kept = planned("resnet20", 0.75)
    widths = {path: (len(one.outputs), len(one.inputs)) for path, one in kept.items() if "first.0" in path}
    assert list(widths.values()) == [(12, 12)] * 3 + [(24, 12)] + [(24, 24)] * 2 + [(48, 24)] + [(48, 48)] * 2
    assert kept["9.first.0"].outputs == kept["9.first.1"] == tuple(range(48))
    assert (len(kept["11.second.0"].outputs), len(kept["11.second.1"])) == (64, 64)
    narrow, shortcut, pad = plan.edges.values()
    assert narrow == shortcut == Narrow(1, tuple(range(12)))
    assert pad == ZeroPad(1, tuple(range(48)), 64)


def test_zero_padded_shortcuts_keep_the_leading_channels_of_each_part() -> None:
    plan, kept = planned("resnet20 with zero-padded shortcuts", 0.75)
    parts = (*range(6), *range(8, 20), *range(24, 30))  # 8 zeros, 16 channels, 8 zeros
    assert kept["6.second.0"].outputs == kept["6.second.1"] == kept["7.first.0"].inputs == parts
    assert list(plan.arguments.values())[:2] == [6, 6]


def test_depthwise_layers_follow_their_input_and_have_fewer_groups() -> None:
    _, kept = planned("mobilenet_v2", 0.5)
    expand, depthwise, project = (kept[f"4.body.{number}"] for number in (0, 3, 6))
    assert depthwise.outputs == depthwise.inputs == expand.outputs == project.inputs == tuple(range(48))
    assert (depthwise.groups, depthwise.columns) == (48, (0,))


def test_grouped_layers_keep_their_groups_and_the_leading_channels_of_each() -> None:
    _, kept = planned("resnext", 0.5)
    grouped = kept["3.branch.3"]
    assert grouped.outputs == grouped.inputs == tuple(one for one in range(128) if one % 4 < 2)
    assert (grouped.groups, grouped.columns) == (32, (0, 1))


def test_a_linear_layer_reads_all_pixels_of_the_kept_channels() -> None:
    _, kept = planned("vgg", 0.5)
    assert kept["30"].inputs == tuple(range(256 * 4))


def test_last_layer_and_its_gate_are_full_and_the_shortcut_is_padded() -> None:
    plan, kept = planned("se_resnet", 0.5)
    assert len(kept["4.branch.3"].outputs) == len(kept["4.gate.expand"].outputs) == 32
    assert len(kept["3.branch.3"].outputs) == len(kept["3.gate.expand"].outputs) == 16
    assert [type(edge) for edge in plan.edges.values()] == [Narrow, Narrow, ZeroPad]


def test_a_concatenation_at_the_exit_pads_each_part_to_its_place() -> None:
    plan, kept = planned("densenet", 0.5)
    pad = list(plan.edges.values())[-1]
    stream, growth = 48 + 5 * 12, 12  # the last layer's input, and what it adds
    assert isinstance(pad, ZeroPad)
    starts = [0, *range(48, stream, growth)]
    sizes = [48] + [growth] * 5
    positions = [range(start, start + size // 2) for start, size in zip(starts, sizes, strict=True)]
    assert pad.positions == tuple(one for part in positions for one in part)
    assert (pad.size, len(kept["17"])) == (stream, stream + growth)


def test_half_branch_equals_slices_by_hand() -> None:
    model, x = example("residual")
    model.eval()
    graph_module = capture(model, x).graph_module
    body = find_body(graph_module)
    plan = plan_at_ratio(graph_module, channel_groups(graph_module, body), 0.5)
    found = check_runs(graph_module, body, plan, x)

    def layer(x: Tensor, convolution: Any, norm: Any, outputs: int) -> Tensor:
        bias = None if convolution.bias is None else convolution.bias[:outputs]
        weight = convolution.weight[:outputs, : x.shape[1]]
        y = functional.conv2d(x, weight, bias, convolution.stride, convolution.padding)
        statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return functional.batch_norm(y, *(one[:outputs] for one in statistics))

    with torch.no_grad():
        x = functional.relu(model.bn0(model.stem(x)))[:, :4]
        y = layer(functional.relu(layer(x, model.conv1, model.bn1, 8)), model.conv2, model.bn2, 8)
        x = functional.relu(y + layer(x, model.down, model.bn3, 8))
        padded = torch.cat([x, torch.zeros_like(x)], 1)
        expected = functional.relu(padded + layer(x, model.conv3, model.bn4, 16)).mean((2, 3))
    torch.testing.assert_close(found, expected)


def test_both_layers_of_a_sum_at_the_exit_are_full_and_nothing_is_padded() -> None:
    build, shape = tied_networks.TIED["frozen norm"]
    torch.manual_seed(0)
    model = build().train()
    graph_module = capture(model).graph_module
    body = find_body(graph_module)
    plan = plan_at_ratio(graph_module, channel_groups(graph_module, body, [(2, *shape)]), 0.5)
    kept = nodes_by_path(plan)
    widths = [(len(kept[path].outputs), len(kept[path].inputs)) for path in ("first", "second", "down")]
    assert widths == [(12, 8), (24, 12), (24, 8)]
    assert {type(edge) for edge in plan.edges.values()} == {Narrow}
    constants = [edge for (_, path), edge in plan.edges.items() if path[0] > 0]
    assert constants == [Narrow(0, tuple(range(12)))] * 4


def test_calls_of_one_layer_keep_the_same_channels() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.again = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.last, self.head = nn.Conv2d(8, 8, 3), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = functional.relu(self.stem(x))
            y = torch.cat([self.again(x), self.again(x)], 1).chunk(2, 1)[0]
            return self.head(self.last(y * self.again(x)).mean((2, 3)))

    graph_module = capture(Twice()).graph_module
    body = find_body(graph_module)
    plan = plan_at_ratio(graph_module, channel_groups(graph_module, body, [(2, 3, 8, 8)]), 0.5)
    calls = {(one.outputs, one.inputs) for node, one in plan.layers.items() if node.target == "again"}
    assert calls == {(tuple(range(8)), tuple(range(4)))}


def test_what_is_not_understood_keeps_its_channels() -> None:
    build, shape = tied_networks.TIED["shuffle"]
    graph_module = capture(build()).graph_module
    body = find_body(graph_module)
    plan = plan_at_ratio(graph_module, channel_groups(graph_module, body, [(2, *shape)]), 0.5)
    kept = nodes_by_path(plan)
    assert (len(kept["part"].outputs), len(kept["part"].inputs)) == (8, 8)
    assert (len(kept["mix"].outputs), len(kept["mix"].inputs)) == (12, 16)


def test_analysis_leaves_the_graph_and_its_statistics_alone() -> None:
    model, x = example("residual")
    graph_module = capture(model.train(), x).graph_module
    before = {name: tensor.clone() for name, tensor in graph_module.state_dict().items()}
    text = str(graph_module.graph)
    half_branch(graph_module, find_body(graph_module))
    assert str(graph_module.graph) == text
    assert all(torch.equal(tensor, before[name]) for name, tensor in graph_module.state_dict().items())


def test_shares_and_shapes_are_checked() -> None:
    graph_module, body, shapes = published("resnet20")
    assert half_branch(graph_module, body, shapes, share=1.0).ratio == pytest.approx(1.0, abs=0.02)
    with pytest.raises(InvalidArgument, match=r"share=0 of a branch"):
        half_branch(graph_module, body, shapes, share=0)
    with pytest.raises(InvalidArgument, match=r"has no known shape; pass example_inputs"):
        half_branch(graph_module, body)
    with pytest.raises(InvalidArgument, match=r"2 input shapes given for 1 inputs"):
        half_branch(graph_module, body, shapes * 2)
    with pytest.raises(InvalidArgument, match=r"does not run on inputs of shape \(2, 5, 32, 32\)"):
        half_branch(graph_module, body, [(2, 5, 32, 32)])
