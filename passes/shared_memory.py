"""Which tensors of a graph share memory, and what stands for each of them after writes into others."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.errors import CaptureError
from qcompile.passes.aten import arguments_of, aten_name, is_aten
from qcompile.passes.fx_op_table import PLAIN_ATTRIBUTES, PLAIN_METHODS
from qcompile.passes.source_lines import source_of
from qcompile.passes.view_writes import PARTIAL, SEVERAL, WrittenView

_VIEWS_OUTSIDE_ATEN = ("narrow", "swapaxes", "swapdims", "moveaxis", "ravel", "diagonal", "tensor_split")
#: No alias in the schema, but without training these return their argument itself.
_SAME_WITHOUT_TRAINING = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
#: Their argument itself where it is of the wanted type already, else a copy.
_CONVERSIONS = ("to", "type_as")
#: A view where strides allow it, else a copy.
_RESHAPES = ("reshape", "flatten", "ravel", "reshape_as")


@dataclass
class _Memory:
    """Attributes:
    owner: the tensor that it was made for.
    writes: how many there were so far.
    last: the last write.
    """

    owner: fx.Node
    writes: int = 0
    last: fx.Node | None = None


@dataclass
class _Tensor:
    """What a node of the original graph is by now.

    Attributes:
        node: the node; where writes return their target, the target.
        memory: where it lies.
        base: the node of the original graph that it is a view of; None for the owner of the memory.
        certain: whether it surely is a view of it, not a copy.
        made_from: its argument, which stood for `base`.
        writes: how many writes `value` has seen.
        value: the node that stands for it after so many writes; None if nothing can.
    """

    node: fx.Node
    memory: _Memory
    base: fx.Node | None
    certain: bool
    made_from: fx.Node | None
    writes: int
    value: fx.Node | None


class SharedMemory:
    """The tensors of a graph whose nodes are visited in order while writes are replaced."""

    def __init__(self) -> None:
        self._tensors: dict[fx.Node, _Tensor] = {}
        self._made: list[fx.Node] = []

    def visit(self, node: fx.Node) -> None:
        """Let a node read what its inputs are by now, and remember it.

        Raises:
            CaptureError: if a write changed an input in a way that no operator expresses.
        """
        base, certain = _base_of(node) or (None, True)
        base = None if base is None else self._tensors[base].node
        for one in node.all_input_nodes:
            now = self._value(one, node)
            if now is None:
                raise self._unknown(one, node)
            if now is not one:
                node.replace_input_with(one, now)
        memory = _Memory(node) if base is None else self._tensors[base].memory
        made_from = None if base is None else self._tensors[base].value
        self._tensors[node] = _Tensor(node, memory, base, certain, made_from, memory.writes, node)

    def stands_for(self, node: fx.Node, other: fx.Node) -> None:
        """Remember that a node is another node of the original graph."""
        self._tensors[node] = self._tensors[other]

    def owner(self, node: fx.Node) -> fx.Node:
        """The input, parameter or operator that a node's memory was made for."""
        return self._tensors[node].memory.owner

    def is_part(self, node: fx.Node) -> bool:
        """Whether a node shows only some elements of its memory."""
        tensor = self._tensors[node]
        return tensor.base is not None and (
            aten_name(tensor.node) in PARTIAL
            or tensor.node.target is operator.getitem
            or self.is_part(tensor.base)
        )

    def write(self, write: fx.Node, written: fx.Node, value: fx.Node) -> None:
        """Remember what a write makes of a tensor, and of all that it is a view of.

        Args:
            write: the write.
            written: the node of the original graph that it writes into.
            value: its new value, a node in front of the write.
        """
        view, now = self._tensors[written].node, value
        new: dict[fx.Node, fx.Node | None] = {view: value}
        while (base := self._tensors[view].base) is not None:
            certain = self._tensors[view].certain
            if aten_name(base) in SEVERAL:
                certain = certain and self._tensors[base].certain
                base = self._tensors[base].base
                assert base is not None
            before = self._value(base, write) if certain and now is not None else None
            if before is None or now is None:
                now = None
            else:
                back = WrittenView(view, before, now, write)
                now = back.tensor_behind()
                self._made += back.made
            new[base] = now
            view = base
        memory = self._tensors[written].memory
        memory.writes, memory.last = memory.writes + 1, write
        for node, found in new.items():
            self._tensors[node].value, self._tensors[node].writes = found, memory.writes

    def drop_unused(self) -> None:
        """Erase what was made and nothing reads."""
        for node in reversed(self._made):
            if not node.users:
                node.graph.erase_node(node)

    def _value(self, node: fx.Node, reader: fx.Node) -> fx.Node | None:
        """What stands for a node after all writes so far, made in front of its reader."""
        tensor = self._tensors[node]
        if tensor.writes < tensor.memory.writes:
            value = None
            base = self._value(tensor.base, reader) if tensor.certain and tensor.base is not None else None
            if base is not None:
                old = tensor.made_from
                with reader.graph.inserting_before(reader):
                    value = reader.graph.node_copy(tensor.node, lambda one: base if one is old else one)
                value.meta = dict(tensor.node.meta)
                self._made.append(value)
            tensor.value, tensor.writes = value, tensor.memory.writes
        return tensor.value

    def _unknown(self, node: fx.Node, reader: fx.Node) -> CaptureError:
        write = self._tensors[node].memory.last
        assert write is not None
        where = "forward" if reader.op == "output" else source_of(reader)
        return CaptureError(
            f"{source_of(write)}: the in-place {write.target} also changes what {where} "
            "reads through another view; use the form without '_', or clone() before it"
        )


def _base_of(node: fx.Node) -> tuple[fx.Node, bool] | None:
    """The argument whose memory a node shares, and whether that is certain; None for a tensor of its own."""
    first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if node.op == "call_method":
        return None if first is None or node.target in PLAIN_METHODS else (first, False)
    if node.op != "call_function" or first is None:
        return None
    if node.target is getattr:
        return None if node.args[1] in PLAIN_ATTRIBUTES else (first, False)
    if node.target is operator.getitem:
        if aten_name(first) in SEVERAL:
            return first, True
        return None if is_aten(first) and _gives_several(first) else (first, False)
    if getattr(node.target, "__name__", "") in _VIEWS_OUTSIDE_ATEN:
        return first, False
    return _aten_base(node, first) if is_aten(node) else None


def _gives_several(node: fx.Node) -> bool:
    returns = node.target._schema.returns  # type: ignore[union-attr]
    return len(returns) > 1 or str(returns[0].type).startswith("List")


def _aten_base(node: fx.Node, first: fx.Node) -> tuple[fx.Node, bool] | None:
    name = aten_name(node)
    if name in _SAME_WITHOUT_TRAINING:
        return None if arguments_of(node)["train"] else (first, True)
    if node.target._schema.arguments[0].alias_info is None and name != "type_as":  # type: ignore[union-attr]
        return None
    if name not in (*_CONVERSIONS, *_RESHAPES, "contiguous"):
        return first, True
    is_view = _is_view(node, first, name)
    return (first, bool(is_view)) if is_view is not False else None


def _is_view(node: fx.Node, first: fx.Node, name: str) -> bool | None:
    """Whether an operator that gives a view or a copy gives a view here; None if that is not known."""
    source, result = first.meta.get("val"), node.meta.get("val")
    if not isinstance(source, Tensor) or not isinstance(result, Tensor):
        return None
    given = arguments_of(node)
    if node.kwargs.get("memory_format", torch.contiguous_format) is not torch.contiguous_format:
        return None
    if name in _CONVERSIONS:
        same = source.dtype == result.dtype and source.device == result.device
        return same and not given.get("copy")
    concrete = _without_data(source), _without_data(result)
    if concrete[0] is None or concrete[1] is None:
        return None
    if name == "contiguous":
        return concrete[0].is_contiguous()
    try:
        concrete[0].view(concrete[1].shape)
    except RuntimeError:
        return False
    return True


def _without_data(value: Tensor) -> Tensor | None:
    """A tensor of the sizes and strides that the example had."""
    numbers = [
        one.node.hint if isinstance(one, torch.SymInt) else one for one in (*value.shape, *value.stride())
    ]
    if any(one is None for one in numbers):
        return None
    rank = value.dim()
    return torch.empty_strided(numbers[:rank], numbers[rank:], dtype=value.dtype, device="meta")
