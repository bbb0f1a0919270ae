"""Find the body of a network with one trunk: what lies between its stem and its classifier.

MBQuant (section 3.3, equation 10) runs several copies of the body on the output of one stem and combines what
they return before one classifier. Where the body starts and ends follows from the data flow: a value that all
paths from the inputs to the outputs go through dominates the outputs, and the body lies between two such
values, one of which alone it reads and one of which alone it gives away.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx
from torch import Tensor, fx, nn

from qcompile.errors import InvalidArgument

from .aten import AVERAGE, ELEMENTWISE, LAYOUT, MAX_POOL, aten_name
from .first_last import weighted_nodes
from .module_tree import tensor_at

NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
DROPOUTS = (nn.modules.dropout._DropoutNd,)
_STEM = ELEMENTWISE | MAX_POOL | AVERAGE | {"batch_norm", "layer_norm", "group_norm"}
_SEVERAL_TENSORS = frozenset(("chunk", "split", "split_with_sizes", "unbind"))
_SIZES = frozenset(("sym_size", "sym_numel", "sym_stride"))
_INPUTS = "graph inputs"  # stands before all placeholders; no node has a blank in its name


@dataclass(frozen=True)
class Body:
    """What several branches copy.

    Attributes:
        entry: the only tensor that the body reads. Not in `nodes`.
        exit: the only tensor of the body that anything behind it reads. In `nodes`.
        nodes: the nodes of the body in graph order, with the constants and sizes that only it needs. Besides
            `entry` they read nothing from outside but sizes (integers) of tensors before the body.
        layers: its convolutions and linear layers, in graph order.
    """

    entry: fx.Node
    exit: fx.Node
    nodes: tuple[fx.Node, ...]
    layers: tuple[fx.Node, ...]


def is_size(node: fx.Node) -> bool:
    """Whether a node asks for the size of a tensor, which is an integer and no data."""
    return aten_name(node) in _SIZES


def value_flow(graph: fx.Graph) -> nx.DiGraph:
    """Data dependencies (by name) of what is computed from the inputs' values and reaches the output.

    Sizes and constants have no values from the inputs; edges from them are left out. `"graph inputs"` stands
    before the placeholders.
    """
    flow = nx.DiGraph()
    flow.add_node(_INPUTS)
    for node in graph.nodes:
        if node.op == "placeholder":
            flow.add_edge(_INPUTS, node.name)
        elif not is_size(node):
            flow.add_edges_from((one.name, node.name) for one in node.all_input_nodes if one.name in flow)
    needed = nx.ancestors(flow, graph.output_node().name) if graph.output_node().name in flow else set()
    return flow.subgraph(needed | {graph.output_node().name}).copy()


def find_body(graph_module: fx.GraphModule) -> Body:
    """Find the body of a network with one trunk.

    The stem is the first weighted layer with the normalisations, activations and poolings in a row behind it:
    they would be the same in every branch. The classifier part starts behind the last point where combining
    branches is right and cheap: the input of the last weighted layer, which is small, but before dropout,
    whose mask is one for all branches. Several last layers may read that point.

    Args:
        graph_module: the canonical float graph.

    Returns:
        The body. The graph is left as it is.

    Raises:
        InvalidArgument: if there is no such body; the message says why.
    """
    return _Search(graph_module).body()


class _Search:
    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._graph_module = graph_module
        self._nodes = {node.name: node for node in graph_module.graph.nodes}
        self._flow = value_flow(graph_module.graph)
        self._weighted = [node for node in weighted_nodes(graph_module) if node.name in self._flow]
        self._names = {node.name for node in self._weighted}

    def body(self) -> Body:
        """The steps, in order; each says what is missing."""
        first = self._first()
        spine = self._spine()
        if first not in spine:
            raise self._read_again(first)
        last = [node for node in self._weighted if not self._names & nx.descendants(self._flow, node.name)]
        entry, exit = self._stem_output(first), self._classifier_input(spine, last)
        before, after = (nx.ancestors(self._flow, exit.name), nx.descendants(self._flow, entry.name))
        inside = (before | {exit.name}) & after
        layers = tuple(node for node in self._weighted if node.name in inside)
        behind = [n for n in self._weighted if n not in (first, *last) and n not in layers]
        if behind:
            raise self._leaves_early(last)
        if not layers:
            raise InvalidArgument(
                f"nothing lies between first layer {_path(first)} and last layer {_path(last[-1])}; "
                "branches need at least one more layer there"
            )
        nodes = self._with_constants(inside)
        self._check_not_shared(nodes)
        return Body(entry, exit, nodes, layers)

    def _first(self) -> fx.Node:
        first = [node for node in self._weighted if not self._names & nx.ancestors(self._flow, node.name)]
        if not first:
            raise InvalidArgument("the network has no convolution or linear layer, hence no body")
        if len(first) == 1:
            return first[0]
        reach = [nx.descendants(self._flow, node.name) for node in first]
        joint = next((node for node in self._nodes.values() if all(node.name in one for one in reach)), None)
        where = "never" if joint is None or joint.op == "output" else f"at {joint.name!r}"
        inputs = [n.name for n in self._nodes.values() if n.op == "placeholder" and n.name in self._flow]
        read = f"inputs {_listed(inputs)} have" if len(inputs) > 1 else f"input {_listed(inputs)} has"
        raise InvalidArgument(
            f"{read} {len(first)} first layers, {_listed(str(node.target) for node in first)}, which join "
            f"{where}; branches need one first layer that all others follow"
        )

    def _spine(self) -> list[fx.Node]:
        """The nodes that all paths from the inputs to the outputs go through, in order."""
        dominators = nx.immediate_dominators(self._flow, _INPUTS)
        spine, name = [], self._graph_module.graph.output_node().name
        while name != _INPUTS:
            spine.append(self._nodes[name])
            name = dominators[name]
        return spine[::-1]

    def _stem_output(self, first: fx.Node) -> fx.Node:
        entry = first
        while True:
            users = list(self._flow.successors(entry.name))
            follower = self._nodes[users[0]]
            if len(users) > 1 or self._flow.in_degree(follower.name) > 1 or not self._is_stem(follower):
                return entry
            entry = follower

    def _is_stem(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self._graph_module.get_submodule(str(node.target)), NORMS)
        return aten_name(node) in _STEM

    def _classifier_input(self, spine: list[fx.Node], last: list[fx.Node]) -> fx.Node:
        behind = {node.name for node in last}.union(*(nx.descendants(self._flow, n.name) for n in last))
        exit = next(node for node in reversed(spine) if node.name not in behind)
        while aten_name(exit) in _SEVERAL_TENSORS:
            exit = exit.all_input_nodes[0]
        node = exit
        # flattening and average pooling commute with the mean over branches, so behind dropout they may move
        while self._flow.in_degree(node.name) == 1:
            if self._is_dropout(node):
                exit = node.all_input_nodes[0]
            elif aten_name(node) not in LAYOUT | AVERAGE:
                break
            name = next(iter(self._flow.predecessors(node.name)))
            if name == _INPUTS:
                break
            node = self._nodes[name]
        return exit

    def _is_dropout(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self._graph_module.get_submodule(str(node.target)), DROPOUTS)
        return "dropout" in aten_name(node)

    def _with_constants(self, inside: set[str]) -> tuple[fx.Node, ...]:
        """The nodes of the body with the constants and sizes they need, unless of tensors before it."""
        chosen = set(inside)
        graph = self._graph_module.graph
        for node in reversed(graph.nodes):
            if node.name in self._flow or not any(user.name in chosen for user in node.users):
                continue
            if all(one.name not in self._flow or one.name in inside for one in node.all_input_nodes):
                chosen.add(node.name)
        return tuple(node for node in graph.nodes if node.name in chosen)

    def _check_not_shared(self, nodes: tuple[fx.Node, ...]) -> None:
        inside = set(nodes)
        owner = {id(tensor): node for node in nodes for tensor in self._state(node)}
        for node in self._nodes.values():
            shared = (
                [] if node in inside else [owner[id(one)] for one in self._state(node) if id(one) in owner]
            )
            if shared:
                raise InvalidArgument(
                    f"{_path(shared[0])} in the body shares its parameters with {_path(node)} outside; "
                    "branches need parameters of their own"
                )

    def _state(self, node: fx.Node) -> list[Tensor]:
        """Parameters and statistics that a call uses."""
        state: list[Tensor] = []
        if node.op == "call_module":
            module = self._graph_module.get_submodule(str(node.target))
            state += [*module.parameters(), *module.buffers()]
        constants = (one for one in node.all_input_nodes if one.op == "get_attr")
        tensors = (tensor_at(self._graph_module, str(one.target)) for one in constants)
        return state + [one for one in tensors if isinstance(one, nn.Parameter)]

    def _read_again(self, first: fx.Node) -> InvalidArgument:
        """The inputs reach the output around the first layer; says where."""
        before = nx.ancestors(self._flow, first.name)
        inputs = [n for n in self._nodes.values() if n.op == "placeholder" and n.name in self._flow]
        other = [node.name for node in inputs if node.name not in before]
        if other:
            main = next(node.name for node in inputs if node.name in before)
            behind = nx.descendants(self._flow, first.name)
            joined = behind & nx.descendants(self._flow, other[0])
            joint = next(node.name for node in self._nodes.values() if node.name in joined)
            return InvalidArgument(
                f"two inputs, {main!r} and {other[0]!r}, join at {joint!r} after first layer {_path(first)}; "
                "branches need one trunk that starts with the first layer"
            )
        around = self._flow.subgraph(set(self._flow) - {first.name})
        reaches = nx.ancestors(around, self._graph_module.graph.output_node().name)
        reaches &= nx.descendants(around, _INPUTS)
        again = next(node for node in self._nodes.values() if node.name in reaches - before)
        return InvalidArgument(
            f"the graph input is read again at {again.name!r}, around first layer {_path(first)}; "
            "branches need one trunk that starts with the first layer"
        )

    def _leaves_early(self, last: list[fx.Node]) -> InvalidArgument:
        """Something computed in the middle reaches an output around the deepest layers; says what."""

        def depth(node: fx.Node) -> int:
            return len(self._names & nx.ancestors(self._flow, node.name))

        deepest = max(last, key=depth)
        reads = self._flow.subgraph(set(self._flow) - set(self._flow.predecessors(deepest.name)))
        outputs = self._graph_module.graph.output_node().args[0]
        for number, output in enumerate(outputs if isinstance(outputs, (tuple, list)) else (outputs,)):
            if not isinstance(output, fx.Node) or output.name not in reads:
                continue
            around = nx.ancestors(reads, output.name) | {output.name}
            if _INPUTS not in around:
                continue
            ends = {node.name for node in last}
            layer = [n for n in self._weighted if n.name in around and n.name not in ends][-1:]
            where = _path(layer[0]) if layer else repr(output.name)
            return InvalidArgument(
                f"output {number} is computed from inside the body at layer {where}, around last layer "
                f"{_path(deepest)}; branches need all outputs behind one classifier"
            )
        return InvalidArgument(f"several values reach the outputs around last layer {_path(deepest)}")


def _path(node: fx.Node) -> str:
    return repr(str(node.target) if node.op == "call_module" else node.name)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
