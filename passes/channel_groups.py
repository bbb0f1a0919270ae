"""Which channels of a body have to be narrowed together.

A narrower copy of a body (MBQuant's half branch, section 3.3) keeps the leading channels of every tensor.
Sums, gates, depthwise and grouped convolutions, concatenation and flattening tie the channels of their
tensors to each other. One walk over the graph finds these ties: a layer's output is a new variable, what
follows hands on, unites or lists variables, and what is not understood keeps all channels it touches.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from .aten import arguments_of, aten_name
from .body import DROPOUTS, Body, is_size
from .channel_rules import RULES, Channels, Moved, Path, Shape, Use
from .channel_variables import Segment, Variables
from .exit_joins import exit_joins, operands
from .first_last import TRANSPOSED, WEIGHTED
from .stochastic_depth import StochasticDepth
from .tensor_shapes import tensor_shapes

_BROADCAST = frozenset(("add", "sub", "mul", "div", "maximum", "minimum", "prelu", "expand_as"))


@dataclass(frozen=True)
class ChannelGroups:
    """The ties between the channels of a body.

    Attributes:
        variables: resolves segments into the indices that are kept.
        channels: channel dimension by node; nodes that are missing keep their shape.
        weights: for each weighted layer, the segments of its weight's output and input features.
        narrowed: uses of full tensors (the entry, parameters) of which the segments' features are read.
        padded: uses of narrow tensors that are padded with zeros to full width.
        counts: arguments that say how many features the segments have.
        shapes: shape of every tensor at full width.
    """

    variables: Variables
    channels: Mapping[fx.Node, Channels]
    weights: Mapping[fx.Node, tuple[tuple[Segment, ...], tuple[Segment, ...]]]
    narrowed: Mapping[Use, Channels]
    padded: Mapping[Use, Channels]
    counts: Mapping[Use, tuple[Segment, ...]]
    shapes: Mapping[fx.Node, Shape]


def channel_groups(
    graph_module: fx.GraphModule, body: Body, input_shapes: Sequence[Sequence[int]] | None = None
) -> ChannelGroups:
    """Find out which channels of a body belong together. The graph is left as it is.

    Args:
        graph_module: the canonical float graph.
        body: its body.
        input_shapes: shapes of the graph's inputs, batch included; None: those of the example inputs.

    Raises:
        InvalidArgument: if shapes are neither known nor given, or the graph does not run on them.
    """
    return _Walk(graph_module, body, tensor_shapes(graph_module, input_shapes)).groups()


class _Walk:
    def __init__(self, graph_module: fx.GraphModule, body: Body, shapes: Mapping[fx.Node, Shape]) -> None:
        self.shapes = shapes
        self.variables = Variables()
        self.channels: dict[fx.Node, Channels] = {}
        self.weights: dict[fx.Node, tuple[tuple[Segment, ...], tuple[Segment, ...]]] = {}
        self.narrowed: dict[Use, Channels] = {}
        self.padded: dict[Use, Channels] = {}
        self.counts: dict[Use, tuple[Segment, ...]] = {}
        self._graph_module = graph_module
        self._body, self._entry = body, body.entry
        self._joins = exit_joins(graph_module.graph, body, shapes)
        self._measured: dict[fx.Node, tuple[Segment, ...]] = {}
        self._calls: dict[str, tuple[Channels, Channels]] = {}
        stem = body.entry
        while not self._is_layer(stem):
            stem = next(one for one in stem.all_input_nodes if one.op != "get_attr")
        ndim = len(shapes[body.entry])
        dim = ndim - 1 if isinstance(self._module(stem), nn.Linear) else 1
        self.channels[body.entry] = Channels(dim, (self.variables.new(shapes[body.entry][dim]),))

    def groups(self) -> ChannelGroups:
        """The ties, after a walk over all nodes of the body."""
        for node in self._body.nodes:
            self.visit(node)
        if self._body.exit in self.channels:
            self.variables.fix(self.channels[self._body.exit].segments)
        return ChannelGroups(
            self.variables, self.channels, self.weights, self.narrowed, self.padded, self.counts, self.shapes
        )

    def visit(self, node: fx.Node) -> None:
        """Find the channels of one node from those of its inputs."""
        if is_size(node) or self._is_number(node):
            self._measure(node)
            return
        if node in self._joins:
            self._join(node, self._joins[node])
            return
        read = [path for path, one in operands(node) if one is self._entry]
        self.narrowed.update({(node, path): self.channels[self._entry] for path in read})
        inputs = [one for one in node.all_input_nodes if one in self.channels]
        moved = self._moved(node, inputs) if inputs or self._is_layer(node) else Moved(None)
        counts = {} if moved is None else moved.counts
        self.counts.update({(node, path): segments for path, segments in counts.items()})
        replaced = [one for path, one in operands(node) if path in counts]
        for one in node.all_input_nodes:
            if one not in replaced:  # may be a number of channels, which the plan does not know
                self.variables.fix(self._measured.get(one, ()))
        if moved is None:  # not understood
            for one in inputs:
                self.variables.fix(self.channels[one].segments)
        elif moved.channels is not None:
            self.channels[node] = moved.channels

    def _module(self, node: fx.Node) -> nn.Module:
        return self._graph_module.get_submodule(str(node.target))

    def _is_layer(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self._module(node), WEIGHTED)

    def _is_number(self, node: fx.Node) -> bool:
        read = node.all_input_nodes
        return bool(read) and all(is_size(one) or one in self._measured for one in read)

    def _measure(self, node: fx.Node) -> None:
        """Note whose channels a size, or a number made of sizes, counts."""
        counted: list[Segment] = []
        for one in node.all_input_nodes:
            counted += self._measured.get(one, ())
            whole = self.channels.get(one) if is_size(node) else None
            if whole is not None and (
                len(node.args) < 2 or int(node.args[1]) % len(self.shapes[one]) == whole.dim
            ):
                counted += whole.segments
        if counted:
            self._measured[node] = tuple(counted)

    def _moved(self, node: fx.Node, inputs: list[fx.Node]) -> Moved | None:
        if node.op == "call_module":
            return self._called(node, self._module(node))
        name = aten_name(node)
        if any(isinstance(one, fx.Node) for one in node.kwargs.values()):
            return None  # the canonical form passes tensors by position
        if name == "cat":
            return self._concatenated(node)
        if name == "batch_norm":
            return self._frozen_norm(node)
        tensors = [one for _, one in operands(node) if one in self.shapes]
        if name in _BROADCAST and len(tensors) > 1:
            return self._broadcast(node)
        source = inputs[0]
        if len(inputs) > 1 or not node.args or node.args[0] is not source:
            return None
        if node.target is operator.getitem and source not in self.shapes and "max_pool" in aten_name(source):
            return Moved(self.channels[source])  # values and indices
        rule = RULES.get(name)
        after = self.shapes.get(node, self.shapes.get(source))
        if rule is None or len(tensors) > 1 or source not in self.shapes or after is None:
            return None
        return rule(node, self.channels[source], self.shapes[source], after, self.variables)

    def _called(self, node: fx.Node, module: nn.Module) -> Moved | None:
        given = self.channels.get(node.args[0])
        if isinstance(module, WEIGHTED):
            return self._layer(node, module, given)
        if given is None or len(node.all_input_nodes) > 1:
            return None
        if isinstance(module, (*DROPOUTS, StochasticDepth, nn.LocalResponseNorm)):
            return Moved(given)
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            if len(module.normalized_shape) > 1 or given.dim != len(self.shapes[node]) - 1:
                return None
        elif isinstance(module, nn.GroupNorm) and given.dim == 1:
            self.variables.align(given.segments, module.num_groups)
        elif not isinstance(module, nn.modules.batchnorm._NormBase) or given.dim != 1:
            return None
        first, _ = self._calls.setdefault(str(node.target), (given, given))
        self.variables.unite(first.segments, given.segments)
        return Moved(given)

    def _layer(self, node: fx.Node, module: Any, given: Channels | None) -> Moved | None:
        is_linear = isinstance(module, nn.Linear)
        dim = len(self.shapes[node]) - 1 if is_linear else 1
        if given is not None and given.dim != dim:
            self.variables.fix(given.segments)
            given = None
        inputs = module.in_features if is_linear else module.in_channels
        outputs = module.out_features if is_linear else module.out_channels
        groups = 1 if is_linear else module.groups
        if given is None:
            given = Channels(dim, (self.variables.new(inputs, fixed=True),))
        if isinstance(module, TRANSPOSED) and groups > 1:
            self.variables.fix(given.segments)
            result = Channels(dim, (self.variables.new(outputs, fixed=True),))
        elif groups > 1 and groups == inputs:
            # every channel has its own `outputs // inputs` filters
            segments = (Segment(s.variable, s.size, s.run * (outputs // inputs)) for s in given.segments)
            result = Channels(dim, tuple(segments))
        else:
            result = Channels(dim, (self.variables.new(outputs),))
            if groups > 1:
                self.variables.align(given.segments, groups)
                self.variables.align(result.segments, groups)
        first = self._calls.setdefault(str(node.target), (given, result))
        if first[1] is not result:  # another call of the same weight
            self.variables.unite(first[0].segments, given.segments)
            self.variables.unite(first[1].segments, result.segments)
        self.weights[node] = (result.segments, given.segments)
        return Moved(result)

    def _join(self, node: fx.Node, padded: frozenset[Path]) -> None:
        """A sum or concatenation at full width, of operands at full width and of padded ones."""
        given = operands(node)
        known = [self.channels[one].dim for _, one in given if one in self.channels]
        if not known:
            return  # at full width anyway
        concatenates = aten_name(node) == "cat"
        dim = int(arguments_of(node)["dim"]) % len(self.shapes[node]) if concatenates else known[0]
        parts: list[Segment] = []
        for path, one in given:
            part = (self.variables.new(self.shapes[one][dim], fixed=True),)
            parts += part
            channels = self.channels.get(one)
            if channels is None or one is self._entry:
                continue
            if channels.dim != dim:
                self.variables.fix(channels.segments)
            elif path in padded:
                self.padded[node, path] = channels
            else:
                self.variables.unite(part, channels.segments)
        self.channels[node] = Channels(dim, tuple(parts) if concatenates else (parts[0],))

    def _concatenated(self, node: fx.Node) -> Moved | None:
        dim = int(arguments_of(node)["dim"]) % len(self.shapes[node])
        given = [(one, self.channels.get(one)) for one in node.args[0]]  # type: ignore[union-attr]
        places = {channels.dim for _, channels in given if channels is not None}
        if len(places) > 1:
            return None
        place = places.pop()
        segments: list[Segment] = []
        for one, channels in given:
            whole = (self.variables.new(self.shapes[one][place], fixed=True),)
            own = whole if channels is None else channels.segments
            if dim == place:
                segments += own
            else:
                segments = segments or list(own)
                self.variables.unite(segments, own)
        return Moved(Channels(place, tuple(segments)))

    def _frozen_norm(self, node: fx.Node) -> Moved | None:
        given = self.channels.get(node.args[0])
        parameters = operands(node)[1:]
        if given is None or given.dim != 1 or any(one.op != "get_attr" for _, one in parameters):
            return None
        self.narrowed.update({(node, path): Channels(0, given.segments) for path, _ in parameters})
        return Moved(given)

    def _broadcast(self, node: fx.Node) -> Moved | None:
        """Tensors that meet element by element share channels; parameters are read as far as needed."""
        given = [(path, one) for path, one in operands(node) if one in self.shapes]
        if aten_name(node) == "prelu":
            return self._sloped(node, given)
        known = {one: self.channels[one] for _, one in given if one in self.channels}
        wide = {one: channels for one, channels in known.items() if channels.features > 1}
        axes = {channels.dim - len(self.shapes[one]) for one, channels in wide.items()}
        if len(axes) > 1:
            return None
        if not axes:
            return Moved(None)
        axis, segments = axes.pop(), next(iter(wide.values())).segments
        for path, one in given:
            shape = self.shapes[one]
            if one in wide:
                self.variables.unite(segments, wide[one].segments)
            elif len(shape) >= -axis and shape[axis] != 1:
                if one.op != "get_attr":
                    return None
                self.narrowed[node, path] = Channels(len(shape) + axis, segments)
        return Moved(Channels(len(self.shapes[node]) + axis, segments))

    def _sloped(self, node: fx.Node, given: list[tuple[Path, fx.Node]]) -> Moved | None:
        (_, source), (path, slope) = given
        if source not in self.channels or self.channels[source].dim != 1 or slope.op != "get_attr":
            return None
        if self.shapes[slope] not in ((), (1,)):
            self.narrowed[node, path] = Channels(0, self.channels[source].segments)
        return Moved(self.channels[source])
