"""From an integer graph to a graph of kernels: who computes what, in which layout.

Every tensor is a *map* in memory (see `maps`), or a tensor as torch sees it, where float operators that have
no kernel of their own read or write it. `rules` says how each operator is built.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from qcompile.errors import LoweringError
from qcompile.passes.integer_model import IntegerModel
from qcompile.passes.static_values import static_values

from . import kernel_op
from .costs import Choice
from .kernel_op import InPlace, Kernel
from .kernels.relayout import from_map_kernel, to_map_kernel
from .maps import Map
from .specs import Layer


@dataclass(frozen=True)
class Mapped:
    """A tensor that lies in a map.

    Attributes:
        node: in the graph of kernels.
        map: where.
        rows: whether channels are the tensor's last dimension, not dimension 1.
    """

    node: fx.Node
    map: Map
    rows: bool


@dataclass(frozen=True)
class Tap:
    """A tensor of the integer graph that is an output too.

    Attributes:
        mapped: where it lies.
        shape: of the tensor.
    """

    mapped: Mapped
    shape: tuple[int, ...]


Rule = Callable[["Builder", fx.Node], None]


class Builder:
    """The graph under construction.

    Args:
        model: the integer graph.
        shapes: of its inputs, batch included.
        choose: the family of kernels for a layer.
        rules: how operators are built, by `IntegerModel.operator_name`; "" for all others.
        tapped: whether every integer tensor becomes an output too.

    Attributes:
        graph: the graph of kernels.
        constants: its constants by name.
        keys: of all its kernels.
        taps: nodes of the integer graph that are further outputs, in order, and how they lie.
    """

    def __init__(
        self,
        model: IntegerModel,
        shapes: tuple[tuple[int, ...], ...],
        choose: Callable[[Layer], Choice],
        rules: Mapping[str, Rule],
        tapped: bool,
    ) -> None:
        self.model, self.choose, self.tapped, self._rules = model, choose, tapped, rules
        self.values = static_values(model, shapes)
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.keys: list[str] = []
        self.taps: dict[str, Tap] = {}
        self.maps: dict[fx.Node, Mapped] = {}
        self._plain: dict[fx.Node, Any] = {}
        self._attributes: dict[str, fx.Node] = {}
        self._again: dict[tuple[Any, ...], Mapped] = {}
        self._names: set[str] = set()
        self._open: set[fx.Node] = set()
        self._absorbed: set[fx.Node] = set()
        self._largest: dict[fx.Node, int] = {}

    def run(self) -> fx.GraphModule:
        """Build every node."""
        for node in self.model.graph.nodes:
            if node.op == "placeholder":
                self._plain[node] = self.graph.placeholder(node.name)
                self._plain[node].meta["dtype"] = node.meta.get("dtype", torch.float32)
            elif node.op == "get_attr":
                continue
            elif node.op == "output":
                outputs = [self.plain(one) for one in torch.utils._pytree.tree_leaves(node.args[0])]
                # kinds of processors build nodes in orders of their own, and share one list of outputs
                places = {one.name: place for place, one in enumerate(self.model.graph.nodes)}
                self.taps = dict(sorted(self.taps.items(), key=lambda one: places[one[0]]))
                self.graph.output((*outputs, *(one.mapped.node for one in self.taps.values())))
            elif not self._is_built(node):
                self._build(node)
        return fx.GraphModule(dict(self.constants), self.graph)

    def _build(self, node: fx.Node) -> None:
        if not isinstance(self.values[node], (Tensor, tuple, list)):
            self._plain[node] = self.values[node]  # a size
            return
        self._open.add(node)
        rule = self._rules.get(self.model.operator_name(node), self._rules[""])
        try:
            rule(self, node)
        except LoweringError as cause:
            if str(cause).startswith("layer "):
                raise
            raise LoweringError(f"layer {str(node.meta.get('layer', node.name))!r}: {cause}") from cause
        self._open.remove(node)

    def ensure(self, nodes: Sequence[fx.Node]) -> bool:
        """Build nodes, and what they need, before their turn.

        Returns:
            False, with nothing built, if they need a node that is being built.
        """
        missing: set[fx.Node] = set()
        waiting = [one for one in nodes if not self._is_built(one)]
        while waiting:
            one = waiting.pop()
            if one in self._open:
                return False
            if one not in missing:
                missing.add(one)
                waiting += [given for given in one.all_input_nodes if not self._is_built(given)]
        for one in self.model.graph.nodes:
            if one in missing and not self._is_built(one):
                self._build(one)
        return True

    def _is_built(self, node: fx.Node) -> bool:
        return node.op == "get_attr" or node in self.maps or node in self._plain or node in self._absorbed

    def absorb(self, node: fx.Node) -> None:
        """Record that a node's only reader computes it."""
        self._absorbed.add(node)

    # ---- what nodes are -----------------------------------------------------------------------------------

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of a node's tensor."""
        return tuple(int(size) for size in self.values[node].shape)

    def dtype(self, node: fx.Node) -> str:
        """Element type of a node's tensor."""
        return str(self.values[node].dtype).removeprefix("torch.")

    def largest(self, node: fx.Node) -> int:
        """A bound on the magnitude of a node's integers, as it is known."""
        name = self.model.operator_name(node)
        if name == "requantize":
            return max(abs(int(one)) for one in node.args[4:6])
        if name == "max_pool":
            return self.largest(node.args[0])
        return self._largest.get(node, 2 ** {"uint8": 8, "int8": 7}.get(self.dtype(node), 63))

    def set_largest(self, node: fx.Node, bound: int) -> None:
        """Record a bound on the magnitude of a node's integers."""
        self._largest[node] = bound

    def array(self, node: fx.Node) -> NDArray[Any]:
        """Content of a constant."""
        return self.model.constant(node).detach().cpu().numpy()

    def is_integer_node(self, node: fx.Node) -> bool:
        """Whether a node holds integers with a unit."""
        return "unit" in node.meta or self.model.operator_name(node).startswith(("accumulate", "sum_pool"))

    # ---- making nodes -------------------------------------------------------------------------------------

    def constant(self, name: str, array: Any) -> fx.Node:
        """A constant of the graph of kernels."""
        chosen, count = name.replace(".", "_"), 1
        while chosen in self.constants and not _same(self.constants[chosen], array):
            count += 1
            chosen = f"{name}_{count}".replace(".", "_")
        if chosen not in self._attributes:
            self.constants[chosen] = torch.from_numpy(np.array(array))
            self._attributes[chosen] = self.graph.get_attr(chosen)
        return self._attributes[chosen]

    def kernel(
        self,
        layer: str,
        what: str,
        inputs: Sequence[fx.Node],
        outputs: Sequence[tuple[tuple[int, ...], str]],
        build: Callable[[str], Any],
        choice: Choice | None = None,
        in_place: InPlace | None = None,
    ) -> list[fx.Node]:
        """Call a kernel; returns a node per output."""
        base = "".join(one if one.isalnum() else "_" for one in f"{layer}_{what}")
        name, count = base, 1
        while name in self._names:
            count += 1
            name = f"{base}_{count}"
        self._names.add(name)
        key = kernel_op.register(Kernel(name, layer, what, tuple(outputs), build, choice, in_place))
        self.keys.append(key)
        made = self.graph.call_function(torch.ops.qcompile_tvm.kernel.default, (list(inputs), key))
        return [self.graph.call_function(operator.getitem, (made, index)) for index in range(len(outputs))]

    # ---- layouts ------------------------------------------------------------------------------------------

    def map_of(self, node: fx.Node, rows: bool, dtype: str, zero_point: int = 0) -> Map:
        """How a node's tensor lies, border included."""
        n, h, w, channels = extents(self.shape(node), rows)
        return Map(n, h, w, channels, dtype, zero_point, self._border(node) if not rows else (0, 0, 0, 0))

    def _border(self, node: fx.Node) -> tuple[int, int, int, int]:
        paddings = [
            padding_of(user)
            for user in node.users
            if self.model.operator_name(user) == "accumulate_conv" and user.args[0] is node
        ]
        top, bottom, left, right = (max((one[side] for one in paddings), default=0) for side in range(4))
        return top, bottom, left, right

    def mapped(self, node: fx.Node, rows: bool, border: tuple[int, int, int, int] = (0, 0, 0, 0)) -> Mapped:
        """A node's tensor in a map with channels where the reader wants them, and at least this border."""
        have = self.maps.get(node)
        same = have is not None and (have.rows == rows or len(self.shape(node)) == 2)
        if have is not None and same and all(a >= b for a, b in zip(have.map.border, border, strict=True)):
            return have
        key = (node, rows, border)
        if key not in self._again:
            low, dtype = self._lowest(node), self.dtype(node)
            stored = "uint8" if dtype in ("uint8", "int8") else dtype
            n, h, w, channels = extents(self.shape(node), rows)
            map = Map(n, h, w, channels, stored, max(0, -low) if stored == "uint8" else 0, border)
            source, shape = self.plain(node), self.shape(node)
            layer = str(node.meta.get("layer", node.name))
            (made,) = self.kernel(
                layer,
                "to_map",
                [source],
                [(map.shape, map.dtype)],
                lambda name: to_map_kernel(name, shape, dtype, rows, map),
            )
            self._again[key] = Mapped(made, map, rows)
        return self._again[key]

    def _lowest(self, node: fx.Node) -> int:
        return -128 if self.dtype(node) == "int8" else 0

    def plain(self, node: fx.Node) -> Any:
        """A node's tensor as torch sees it, or its value if it is a size."""
        if node not in self._plain:
            if node.op == "get_attr":
                return self.constant(f"plain_{node.target}", self.array(node))
            source = self.maps[node]
            shape, dtype = self.shape(node), self.dtype(node)
            layer = str(node.meta.get("layer", node.name))
            (self._plain[node],) = self.kernel(
                layer,
                "from_map",
                [source.node],
                [(shape, dtype)],
                lambda name: from_map_kernel(name, source.map, shape, dtype, source.rows),
            )
        return self._plain[node]

    def set_plain(self, node: fx.Node, value: Any) -> None:
        """Record a tensor as torch sees it."""
        self._plain[node] = value

    def set_map(self, node: fx.Node, mapped: Mapped) -> None:
        """Record a tensor in a map."""
        self.maps[node] = mapped
        if self.tapped and self.is_integer_node(node) and not node.meta.get("is_part"):
            self.taps[node.name] = Tap(mapped, self.shape(node))


def extents(shape: tuple[int, ...], rows: bool) -> tuple[int, int, int, int]:
    """(n, h, w, channels) of a tensor.

    Raises:
        LoweringError: for more than two spatial dimensions.
    """
    if rows or len(shape) == 2:
        leading = 1
        for size in shape[:-1]:
            leading *= size
        return 1, 1, leading, shape[-1]
    if len(shape) == 3:
        return shape[0], 1, shape[2], shape[1]
    if len(shape) == 4:
        return shape[0], shape[2], shape[3], shape[1]
    raise LoweringError(
        f"a tensor of shape {shape} has too many dimensions for this target's kernels; lower to onnx-qdq"
    )


def padding_of(node: fx.Node) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of an accumulate_conv node."""
    flat = [int(one) for one in node.args[5]]
    return (0, 0, flat[0], flat[1]) if len(flat) == 2 else (flat[0], flat[1], flat[2], flat[3])


def _same(tensor: Tensor, array: Any) -> bool:
    other = torch.from_numpy(np.array(array))
    return tensor.shape == other.shape and tensor.dtype == other.dtype and torch.equal(tensor, other)
