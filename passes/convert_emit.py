"""Build the integer graph: constants, epilogues, accumulators, float islands."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx, nn

from . import integer_ops  # registers the operators
from .bent import Bent
from .fold import WIDE_BITS, Affine, Epilogue, Term, broadcastable, wide_epilogue
from .integer_model import IntegerModel
from .mode_input import ModeModule
from .module_tree import tensor_at
from .stream_readers import StreamReader, stream_readers

#: A sum with wider bounds is kept within these ranges of the quantiser that reads it, or these steps.
SUM_RANGES, SUM_STEPS = 2.0**5, 2.0**11

#: The finest step of all quantisers that such a sum reaches has 2^13 units, as far as 29 bits allow. More
#: would take bits from multipliers that differ between channels.
SUM_UNIT_BITS = 13

#: Units of a sum that no quantiser reads may be this much coarser than those of a summand.
SUM_GROWTH = 64.0

#: What a tensor of the training graph is in the integer graph: an affine map of integers, or a float node
#: (also sizes and other non-tensors).
Value: TypeAlias = "Affine | fx.Node"

_OPS = torch.ops.qcompile


class Emitter:
    """The graph under construction, for one mode or policy of one model.

    Attributes:
        model: owner of the modules.
        row_of: the row of each module that depends on the mode.
        statistics: a policy's own of batch normalisation.
        shapes: shape of every node's value in the training graph.
        keeps_integers: whether a node's value is integer where its inputs are.
        constants: buffers of the result by name.
        bent: what else is known of tensors that a PReLU made: their affine map before it.
    """

    def __init__(
        self,
        model: nn.Module,
        row_of: Callable[[ModeModule], int],
        statistics: Tensor | None,
        shapes: dict[fx.Node, tuple[int, ...]],
        keeps_integers: Callable[[fx.Node], bool],
    ) -> None:
        assert integer_ops.__all__
        self.model, self.row_of, self.statistics, self.shapes = model, row_of, statistics, shapes
        self.keeps_integers = keeps_integers
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self._attributes: dict[str, fx.Node] = {}
        self.bent: dict[fx.Node, Bent] = {}
        self._plain: dict[int, tuple[Affine, Affine]] = {}
        self._float: dict[int, tuple[Affine, fx.Node]] = {}

    def placeholder(self, node: fx.Node) -> fx.Node:
        """A user's input; inputs are float (or whatever the user passes) and never changed here."""
        copied = self.graph.placeholder(node.name)
        copied.meta = {"dtype": input_dtype(node)}
        return copied

    def constant(self, name: str, value: Any, dtype: torch.dtype) -> fx.Node:
        """A buffer of the integer graph; equal names mean equal values."""
        first = name.partition(".")[0]
        if hasattr(IntegerModel, first):  # a node or a user's module may be called like one of its methods
            name = f"{first}_{name.removeprefix(first)}"
        if name not in self._attributes:
            tensor = value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
            self.constants[name] = tensor.to(dtype, copy=True).contiguous()
            self._attributes[name] = self.graph.get_attr(name)
        return self._attributes[name]

    def call(self, target: Any, args: tuple[Any, ...], name: str, **meta: Any) -> fx.Node:
        """A call whose node is named after what it computes."""
        node = self.graph.create_node("call_function", target, args, {}, name=name.replace(".", "_"))
        node.meta.update(meta)
        return node

    def float_attribute(self, node: fx.Node) -> fx.Node:
        """A parameter or buffer that a float operator reads directly."""
        found = tensor_at(self.model, str(node.target))
        assert found is not None
        return self.constant(str(node.target), found, folded_dtype(found))

    # ---- integers -----------------------------------------------------------------------------------------

    def epilogue(self, affine: Affine, epilogue: Epilogue, name: str) -> Affine:
        """Emit `requantize`; the result is a plain integer tensor."""
        inputs = [term.node for term in affine.terms]
        multipliers = [
            self.constant(f"{name}.multiplier_{i}", broadcastable(m, affine.rank, affine.axis), torch.int64)
            for i, m in enumerate(epilogue.multipliers)
        ]
        offset = broadcastable(epilogue.constant, affine.rank, affine.axis)
        constant = self.constant(f"{name}.constant", offset, torch.int64)
        node = self.call(
            _OPS.requantize.default,
            (inputs, multipliers, constant, epilogue.shift, epilogue.low, epilogue.high),
            name,
            layer=name,
            layers=list(affine.layers),
            unit=epilogue.unit,
        )
        term = Term(node, np.float64(epilogue.unit), np.float64(epilogue.low), np.float64(epilogue.high))
        return Affine((term,), np.float64(0.0), affine.rank, 1, layers=affine.layers)

    def plain(self, affine: Affine) -> Affine:
        """The tensor as one integer tensor times one scalar; high precision if it is not so yet."""
        if affine.is_plain:
            return affine
        if id(affine) not in self._plain:
            name = f"{affine.layers[-1] if affine.layers else 'input'}.output_{len(self._plain)}"
            # the key keeps its affine alive, so that an id is never reused
            self._plain[id(affine)] = (affine, self.epilogue(affine, wide_epilogue(affine), name))
        return self._plain[id(affine)][1]

    def unclipped(self, affine: Affine) -> Affine:
        """The tensor without a pending clip."""
        return self.plain(affine) if affine.is_clipped else affine

    def moved(self, affine: Affine, node: fx.Node, axis: int = 1, rank: int | None = None) -> Affine:
        """A plain tensor whose elements another node has moved or selected; 0 may have been added."""
        term = affine.terms[0]
        low, high = term.bounds  # channels may have moved, so bounds of single ones do not hold any more
        low, high = min(low, 0.0), max(high, 0.0)
        node.meta["unit"] = float(term.coefficient)
        moved = Term(node, term.coefficient, np.float64(low), np.float64(high))
        return Affine((moved,), affine.constant, rank or affine.rank, axis, layers=affine.layers)

    def picked(self, node: fx.Node, container: Affine) -> Affine:
        """One of the tensors that a split of integers gives."""
        copied = self.graph.node_copy(node, lambda _: container.terms[0].node)
        copied.meta = {"layer": node.name}
        return self.moved(container, copied, rank=len(self.shapes[node]))

    def fixed_point(self, source: fx.Node, value: fx.Node) -> Affine | None:
        """A float tensor as integers, fine enough to join an integer stream such as a residual sum.

        A stream that layer normalisation reads, or only operators without an integer form, stays in float:
        they may take apart what is small beside the stream's range.

        Values saturate beyond 256 sqrt(Q) steps of the nearest quantiser that reads the stream, Q its largest
        code: 512 times the mean magnitude of the values for which LSQ's initial step would be right. That
        range is half of what a stream may hold, so that the stream's first sum keeps the unit.

        Returns:
            None if no quantiser reads the tensor, directly or behind operators on integers, or layer
            normalisation does before.
        """
        readers = self._readers(source)
        if not readers:
            return None
        limit = 2 ** (WIDE_BITS - 1)
        reach = readers[0].reach(256.0 * math.sqrt(readers[0].levels))
        return self.rounded(source, value, float(np.float32(reach / limit)), limit)

    def rounded(self, source: fx.Node, value: fx.Node, unit: float, limit: int) -> Affine:
        """A float tensor as multiples of `unit`, up to `limit` of them."""
        name = f"{source.name}.fixed_point"
        node = self.call(_OPS.quantize.default, (value, unit, -limit, limit), name, layer=name, unit=unit)
        term = Term(node, np.float64(unit), np.float64(-limit), np.float64(limit))
        return Affine((term,), np.float64(0.0), len(self.shapes[source]), 1, layers=(source.name,))

    def bounded(self, source: fx.Node, value: Affine) -> Affine | None:
        """A sum that saturates far beyond what the quantiser behind it tells apart.

        Where sums follow on each other through batch normalisation, bounds grow exponentially with the depth
        while values do not; units that span them would be coarser than the steps of quantisers.

        Returns:
            None if no quantiser reads the sum, or layer normalisation before one, and units that span it
            would be too coarse: it is float then.
        """
        readers = self._readers(source)
        if not readers:
            low, high = value.real_range()
            unit = max(-float(low.min()), float(high.max())) * 2.0**-WIDE_BITS
            finest = min(float(np.median(np.abs(term.coefficient))) for term in value.terms)
            return value if unit <= SUM_GROWTH * finest else None
        limit = readers[0].reach(max(SUM_RANGES * readers[0].levels, SUM_STEPS))
        clipped = value.clipped(-limit, limit)
        if not clipped.is_clipped:
            return value
        steps = limit / min(one.step for one in readers)
        return replace(clipped, wide_bits=min(WIDE_BITS, math.ceil(math.log2(steps)) + SUM_UNIT_BITS))

    def _readers(self, source: fx.Node) -> list[StreamReader]:
        return stream_readers(self.model, self.row_of, self.statistics, self.keeps_integers, source)

    # ---- float --------------------------------------------------------------------------------------------

    def to_float(self, value: Value) -> fx.Node:
        """The tensor as float32, for operators that have no integer form."""
        if isinstance(value, fx.Node):
            return value
        if id(value) not in self._float:
            plain = self.plain(value) if len(value.terms) > 1 or value.is_clipped else value
            term = plain.terms[0]
            name = f"{value.layers[-1] if value.layers else term.node.name}.float_{len(self._float)}"
            scale = self.constant(
                f"{name}.scale", broadcastable(term.coefficient, plain.rank, plain.axis), torch.float32
            )
            bias = self.constant(
                f"{name}.bias", broadcastable(plain.constant, plain.rank, plain.axis), torch.float32
            )
            node = self.call(_OPS.dequantize.default, (term.node, scale, bias), name, layer=name)
            self._float[id(value)] = (value, node)
        return self._float[id(value)][1]

    def island(self, node: fx.Node, values: dict[fx.Node, Value]) -> fx.Node:
        """Any other operator, in float."""

        def convert(one: fx.Node) -> fx.Node:
            value = values[one]
            if isinstance(value, Affine) and aten_is_size(node):
                return value.terms[0].node
            return self.to_float(value)

        copied = self.graph.node_copy(node, convert)
        copied.meta = {"layer": node.name}
        return copied

    def output(self, node: fx.Node, values: dict[fx.Node, Value]) -> None:
        """The model's outputs, in float."""
        self.graph.output(fx.map_arg(node.args[0], lambda one: self.to_float(values[one])))

    def finish(self) -> fx.Graph:
        """The graph without nodes that nothing reads."""
        self.graph.eliminate_dead_code()
        used = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        self.constants = {name: value for name, value in self.constants.items() if name in used}
        self.graph.lint()
        return self.graph


def input_dtype(placeholder: fx.Node) -> torch.dtype:
    """The dtype of an input of the integer graph: float32 for floats, else that of the capture."""
    value = placeholder.meta.get("val")
    return folded_dtype(value) if isinstance(value, Tensor) else torch.float32


def folded_dtype(tensor: Tensor) -> torch.dtype:
    """What is float stays float32 in integer graphs, whatever the model was converted to for training."""
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


def aten_is_size(node: fx.Node) -> bool:
    """Whether the node only asks for a size."""
    return "sym_size" in str(node.target) or "sym_numel" in str(node.target)
