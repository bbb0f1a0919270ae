"""Plan a half branch: the slice of a branch that has about half of its multiply-accumulates.

MBQuant (section 3.3) runs an odd bit-width with an extra branch "with its channel number by halves", which
reads the leading channels of the stem's output and whose last layer gives all channels. It owns no weights:
its layers are the leading output and input channels of a full branch's. The widths here all take the same
ratio of the full ones, about the square root of one half, chosen so that the multiply-accumulates come out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from qcompile.errors import InvalidArgument

from .body import NORMS, Body
from .channel_groups import ChannelGroups, channel_groups
from .channel_rules import Use
from .channel_variables import features

_BISECTIONS = 24  # widths have far fewer steps than 2^24


@dataclass(frozen=True)
class LayerSlice:
    """What a weighted layer keeps.

    Attributes:
        outputs: indices of the kept output features.
        inputs: indices of the kept input features.
        rows, columns: indices into the weight's dimensions 0 and 1: outputs and inputs, in transposed
            convolutions inputs and outputs. With groups those of dimension 1 are counted within a group, and
            the same of every group are kept.
        groups: number of channel groups of the narrower layer; fewer only in depthwise convolutions.
        macs: multiply-accumulates per sample.
    """

    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    groups: int
    macs: int


@dataclass(frozen=True)
class Narrow:
    """A use of a tensor of which only the features `kept` along `dim` are read."""

    dim: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class ZeroPad:
    """A use of a tensor whose features go to `positions` of `size` zeros along `dim`."""

    dim: int
    positions: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class HalfPlan:
    """How to run a body with fewer channels and the same parameters.

    Attributes:
        layers: by weighted node, what it keeps.
        norms: by normalisation node, the kept channels of its parameters and statistics.
        edges: by use (the call, and the path into its args), how the tensor is narrowed or padded on the way.
        arguments: by use, the number that replaces one that counts channels (of reshape, expand, pad).
        ranks: dimensions of the tensors of the body and of its surroundings.
        ratio: the share of its channels that every width keeps, before rounding.
        macs, full_macs: multiply-accumulates per sample in the weighted layers of the slice and the body.
    """

    layers: Mapping[fx.Node, LayerSlice]
    norms: Mapping[fx.Node, tuple[int, ...]]
    edges: Mapping[Use, Narrow | ZeroPad]
    arguments: Mapping[Use, int]
    ranks: Mapping[fx.Node, int]
    ratio: float
    macs: int
    full_macs: int


def half_branch(
    graph_module: fx.GraphModule,
    body: Body,
    input_shapes: Sequence[Sequence[int]] | None = None,
    share: float = 0.5,
) -> HalfPlan:
    """Choose the widths whose multiply-accumulates are closest to a share of the body's.

    Args:
        graph_module: the canonical float graph; it is left as it is.
        body: its body.
        input_shapes: shapes of the graph's inputs, batch included; None: those of the example inputs.
        share: share of the body's multiply-accumulates, 0 < share <= 1.

    Returns:
        The plan. Where operators tie channels that cannot be sliced, `macs` may stay above the share.

    Raises:
        InvalidArgument: if `share` is out of range, shapes are neither known nor given, or the graph does not
            run on them.
    """
    if not 0 < share <= 1:
        raise InvalidArgument(f"share={share} of a branch must lie above 0 and be at most 1")
    groups = channel_groups(graph_module, body, input_shapes)
    full = sum(one.macs for one in _layers(graph_module, groups, 1.0).values())
    target = share * full
    low, high = 0.0, 1.0  # multiply-accumulates grow with the ratio
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if sum(one.macs for one in _layers(graph_module, groups, middle).values()) > target:
            high = middle
        else:
            low = middle
    plans = [plan_at_ratio(graph_module, groups, ratio) for ratio in (low, high)]
    return min(plans, key=lambda plan: abs(plan.macs - target))


def plan_at_ratio(graph_module: fx.GraphModule, groups: ChannelGroups, ratio: float) -> HalfPlan:
    """The plan in which every width keeps one share of its channels.

    Args:
        graph_module: the canonical float graph.
        groups: the ties between the channels of its body.
        ratio: the share, 0 to 1; every width keeps at least one channel of each of its groups.
    """
    layers = _layers(graph_module, groups, ratio)
    full = sum(one.macs for one in _layers(graph_module, groups, 1.0).values())
    norms, edges = {}, {}
    for node, channels in groups.channels.items():
        if node.op == "call_module" and isinstance(graph_module.get_submodule(str(node.target)), NORMS):
            norms[node] = groups.variables.kept(channels.segments, ratio)
    for uses, kind in ((groups.narrowed, _narrow), (groups.padded, _zero_pad)):
        for use, channels in uses.items():
            kept = groups.variables.kept(channels.segments, ratio)
            if len(kept) < channels.features:
                edges[use] = kind(channels.dim, kept, channels.features)
    arguments = {use: len(groups.variables.kept(segments, ratio)) for use, segments in groups.counts.items()}
    macs = sum(one.macs for one in layers.values())
    ranks = {node: len(shape) for node, shape in groups.shapes.items()}
    return HalfPlan(layers, norms, edges, arguments, ranks, ratio, macs, full)


def _narrow(dim: int, kept: tuple[int, ...], size: int) -> Narrow | ZeroPad:
    return Narrow(dim, kept)


def _zero_pad(dim: int, kept: tuple[int, ...], size: int) -> Narrow | ZeroPad:
    return ZeroPad(dim, kept, size)


def _layers(graph_module: fx.GraphModule, groups: ChannelGroups, ratio: float) -> dict[fx.Node, LayerSlice]:
    return {
        node: _layer(graph_module.get_submodule(str(node.target)), node, groups, ratio)
        for node in groups.weights
    }


def _layer(module: Any, node: fx.Node, groups: ChannelGroups, ratio: float) -> LayerSlice:
    of_outputs, of_inputs = groups.weights[node]
    outputs = groups.variables.kept(of_outputs, ratio)
    inputs = groups.variables.kept(of_inputs, ratio)
    count = 1 if isinstance(module, nn.Linear) else module.groups
    kernel = math.prod(module.weight.shape[2:])
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        within = outputs if count == 1 else tuple(range(len(outputs) // count))
        # multiplies once per input pixel, where other convolutions do once per output pixel
        source = node.all_input_nodes[0]
        macs = _pixels(groups, source, features(of_inputs)) * len(inputs) * len(within) * kernel
        return LayerSlice(outputs, inputs, inputs, within, count, macs)
    own = features(of_inputs) // count  # inputs of one group
    within = tuple(index for index in inputs if index < own) if own > 1 else (0,)
    macs = _pixels(groups, node, features(of_outputs)) * len(outputs) * len(within) * kernel
    return LayerSlice(outputs, inputs, outputs, within, len(inputs) if own == 1 else count, macs)


def _pixels(groups: ChannelGroups, node: fx.Node, size: int) -> int:
    """Positions per sample of a tensor of `size` features."""
    inputs = [one for one in node.graph.find_nodes(op="placeholder") if groups.shapes.get(one)]
    batched = [one for one in inputs if _is_batched(one)]
    batch = groups.shapes[(batched or inputs)[0]][0]
    return math.prod(groups.shapes[node]) // (size * batch)


def _is_batched(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and isinstance(value.shape[0], torch.SymInt)
