"""In-place operators become functional ones whose result all later uses take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from qcompile.errors import CaptureError
from qcompile.passes.aten import arguments_of, aten_name, is_aten
from qcompile.passes.manager import Condition, Pass, PassResult
from qcompile.passes.shared_memory import SharedMemory
from qcompile.passes.source_lines import source_of

_aten = torch.ops.aten
# Functional forms whose overload has another name than the in-place one.
_RENAMED: dict[OpOverload, OpOverload] = {
    _aten.bernoulli_.float: _aten.bernoulli.p,
    _aten.normal_.default: _aten.normal_functional.default,
    _aten.zero_.default: _aten.zeros_like.default,
    _aten.fill_.Scalar: _aten.full_like.default,
}
#: Writes that put something else in places of a tensor, as a cache is filled.
_ASSIGNMENTS = frozenset(
    ("copy_", "index_put_", "index_copy_", "index_add_", "index_fill_", "index_reduce_", "put_")
    + ("scatter_", "scatter_add_", "scatter_reduce_", "masked_scatter_", "fill_diagonal_")
)


def is_write(node: fx.Node) -> bool:
    """Whether a node writes into one of its arguments."""
    return is_aten(node) and node.target._schema.is_mutable  # type: ignore[union-attr]


def _first_write(graph_module: fx.GraphModule) -> str | None:
    return next(
        (f"'{node.name}' writes in place" for node in graph_module.graph.nodes if is_write(node)), None
    )


FUNCTIONAL = Condition("has no operator that writes in place", _first_write)


class RemoveInPlace(Pass):
    """`y = relu_(x)` becomes `y = relu(x)`, and everything after it that used `x` uses `y`.

    A write into a view gives the tensor behind it a new value, too (`view_writes`), and other views that are
    read later are made again. Where that cannot be done, the pass raises if they are. The update of
    BatchNorm's counter is dropped, since the BatchNorm modules count for themselves.
    """

    ensures = (FUNCTIONAL,)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Raises: CaptureError if a write cannot be expressed, or goes into inputs or buffers."""
        memory, writes = SharedMemory(), []
        for node in list(graph_module.graph.nodes):
            written = _written(node) if is_write(node) else None
            memory.visit(node)
            if written is not None:
                writes.append(node)
                memory.stands_for(node, written)
                if _updates_counter(node, written, memory):
                    continue
                _refuse_assignment_into_input(node, written, memory)
                value = _functional(graph_module, node)
                if value is not node.args[0]:  # `x[0] += 1` copies what it added to into its own place
                    memory.write(node, written, value)
        memory.drop_unused()
        for node in reversed(writes):
            graph_module.graph.erase_node(node)
        return PassResult(graph_module, bool(writes))


def _written(node: fx.Node) -> fx.Node:
    """The tensor that a node writes into."""
    assert isinstance(node.target, OpOverload)
    arguments = arguments_of(node)
    written = [
        arguments[one.name]
        for one in node.target._schema.arguments
        if one.alias_info is not None and one.alias_info.is_write
    ]
    target = written[0] if len(written) == 1 else None
    if isinstance(target, fx.Node) and (target is node.args[0] or target.op == "get_attr"):
        return target
    raise CaptureError(
        f"{source_of(node)}: {node.target} writes into its arguments; use the form without 'out='"
    )


def _updates_counter(node: fx.Node, written: fx.Node, memory: SharedMemory) -> bool:
    """Whether a write is that of BatchNorm's counter; other buffers may not be written."""
    owner = memory.owner(written)
    if owner.op != "get_attr":
        return False
    if str(owner.target).rpartition(".")[2] == "num_batches_tracked":
        return True
    raise CaptureError(
        f"{source_of(node)}: forward writes into '{owner.target}'; state that changes in forward is only "
        "supported inside BatchNorm: pass it as an input, clone() it, and return the new one"
    )


def _refuse_assignment_into_input(node: fx.Node, written: fx.Node, memory: SharedMemory) -> None:
    """A whole input that is overwritten, as `ReLU(inplace=True)` does, is scratch memory; a cache is not."""
    owner = memory.owner(written)
    assigns = aten_name(node) in _ASSIGNMENTS and not _is_under_mask(node)
    if owner.op == "placeholder" and (assigns or memory.is_part(written)):
        raise CaptureError(
            f"{source_of(node)}: forward writes into a part of its input '{owner.name}', which the caller "
            "would see; clone() it before, and return the new one where the caller needs it"
        )


def _is_under_mask(node: fx.Node) -> bool:
    indices = [one for one in arguments_of(node).get("indices") or () if one is not None]
    values = [one.meta.get("val") for one in indices]
    return bool(values) and all(isinstance(one, Tensor) and one.dtype is torch.bool for one in values)


def _functional(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """A new node, in front of a write, that computes what the write leaves in its target."""
    target = node.target
    assert isinstance(target, OpOverload)
    if target in (_aten.copy_.default, _aten.fill_.Tensor):
        return _assigned(graph_module.graph, node)
    functional = _RENAMED.get(target)
    if functional is None:
        packet = getattr(torch.ops.aten, target._schema.name.partition("::")[2].removesuffix("_"), None)
        functional = getattr(packet, target._overloadname, None) if packet is not None else None
    if functional is None or functional._schema.is_mutable:
        raise CaptureError(f"{source_of(node)}: {target} has no functional form; use the form without '_'")
    with graph_module.graph.inserting_before(node):
        replacement = graph_module.graph.call_function(functional, node.args, node.kwargs)
    replacement.meta = dict(node.meta)
    return _with_dtype_of(graph_module, node, replacement)


def _assigned(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """What another tensor is in the type and shape of the one that it is copied into."""
    target, source = node.args[:2]
    assert isinstance(target, fx.Node)

    def call(function: Any, *args: Any) -> fx.Node:
        with graph.inserting_before(node):
            made = graph.call_function(function, args)
        made.meta = dict(node.meta)
        return made

    if not isinstance(source, fx.Node):
        return call(_aten.full_like.default, target, source)
    have, want = source.meta.get("val"), target.meta.get("val")
    if not isinstance(have, Tensor) or not isinstance(want, Tensor):
        return call(_aten.expand_as.default, call(_aten.type_as.default, source, target), target)
    if have.dtype != want.dtype:
        source = call(_aten.to.dtype, source, want.dtype)
        source.meta["val"] = have
    if str(have.shape) == str(want.shape):
        return source
    skipped = want.dim() - have.dim()
    sizes = [
        size if type(size) is int
        # an open size that both have is kept
        else -1 if place >= skipped and str(have.shape[place - skipped]) == str(size)
        else call(_aten.sym_size.int, target, place)
        for place, size in enumerate(want.shape)
    ]  # fmt: skip
    return call(_aten.expand.default, source, sizes)


def _with_dtype_of(graph_module: fx.GraphModule, node: fx.Node, replacement: fx.Node) -> fx.Node:
    """In place the dtype stays; the functional form may promote to that of another argument."""
    values = [one.meta.get("val") for one in node.all_input_nodes]
    dtypes = [value.dtype for value in values if isinstance(value, Tensor)]
    if not dtypes or all(torch.promote_types(dtypes[0], dtype) == dtypes[0] for dtype in dtypes):
        return replacement
    with graph_module.graph.inserting_before(node):
        cast = graph_module.graph.call_function(_aten.to.dtype, (replacement, dtypes[0]))
    cast.meta = dict(node.meta)
    return cast
