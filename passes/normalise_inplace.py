"""In-place operators become functional ones whose result all later uses take."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from qcompile.errors import CaptureError
from qcompile.passes.aten import arguments_of, is_aten
from qcompile.passes.manager import Condition, Pass, PassResult
from qcompile.passes.source_lines import source_of

_aten = torch.ops.aten
# Functional forms whose overload has another name than the in-place one.
_RENAMED: dict[OpOverload, OpOverload] = {
    _aten.bernoulli_.float: _aten.bernoulli.p,
    _aten.normal_.default: _aten.normal_functional.default,
}


_VIEWS_OUTSIDE_THE_TABLE = ("narrow", "swapaxes", "swapdims", "moveaxis", "ravel", "diagonal", "tensor_split")
_SAME_WITHOUT_TRAINING = (
    _aten.dropout.default,
    _aten.feature_dropout.default,
    _aten.alpha_dropout.default,
    _aten.feature_alpha_dropout.default,
)


def is_write(node: fx.Node) -> bool:
    """Whether a node writes into one of its arguments."""
    return is_aten(node) and node.target._schema.is_mutable  # type: ignore[union-attr]


def _first_write(graph_module: fx.GraphModule) -> str | None:
    return next(
        (f"'{node.name}' writes in place" for node in graph_module.graph.nodes if is_write(node)), None
    )


FUNCTIONAL = Condition("has no operator that writes in place", _first_write)


def _may_alias(node: fx.Node) -> list[fx.Node]:
    """Arguments whose memory the result of a node may share."""
    if node.op == "call_method" or node.target in (operator.getitem, getattr):
        return node.all_input_nodes[:1]  # x.T, x.narrow(...), x.float(): may be a view
    if node.op == "call_function" and getattr(node.target, "__name__", "") in _VIEWS_OUTSIDE_THE_TABLE:
        return node.all_input_nodes[:1]
    if not is_aten(node):
        return []
    if node.target in _SAME_WITHOUT_TRAINING:
        # no alias in the schema, but without training these return their argument itself
        arguments = arguments_of(node)
        return [] if arguments["train"] else [arguments["input"]]
    shared: list[fx.Node] = []
    for argument, value in zip(node.target._schema.arguments, arguments_of(node).values(), strict=True):  # type: ignore[union-attr]
        if argument.alias_info is not None and isinstance(value, fx.Node):
            shared.append(value)
    return shared


class RemoveInPlace(Pass):
    """`y = relu_(x)` becomes `y = relu(x)`, and everything after it that used `x` uses `y`.

    That is the same function only if no other view of the same memory is used afterwards; otherwise the pass
    raises. The update of BatchNorm's counter is dropped, since the BatchNorm modules count for themselves.
    """

    ensures = (FUNCTIONAL,)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Raises: CaptureError if a write is seen through another view, or goes to a parameter or buffer."""
        nodes = list(graph_module.graph.nodes)
        order = {node: index for index, node in enumerate(nodes)}
        memory: dict[fx.Node, fx.Node] = {}  # node -> the first node that owns the same memory
        modified = False
        for node in nodes:
            if not is_write(node):
                shared = _may_alias(node)
                memory[node] = memory[shared[0]] if shared else node
                continue
            modified = True
            written = _written(node)
            if written.op == "get_attr":
                _drop_buffer_update(graph_module, node, written)
                continue
            self._check_unseen(node, written, memory, order)
            replacement = _functional(graph_module, node)
            order[replacement] = order[node]
            # the result takes over the memory of what was written
            memory[replacement] = memory[written]
            for user in list(written.users):
                if order.get(user, -1) > order[node]:
                    user.replace_input_with(written, replacement)
            node.replace_all_uses_with(replacement)
            graph_module.graph.erase_node(node)
        return PassResult(graph_module, modified)

    @staticmethod
    def _check_unseen(
        node: fx.Node, written: fx.Node, memory: dict[fx.Node, fx.Node], order: dict[fx.Node, int]
    ) -> None:
        for other, owner in memory.items():
            if owner is not memory[written] or other is written:
                continue
            late = [user for user in other.users if order.get(user, -1) > order[node]]
            if late:
                reader = "forward" if late[0].op == "output" else source_of(late[0])
                raise CaptureError(
                    f"{source_of(node)}: the in-place {node.target} also changes what {reader} "
                    "reads through another view; use the form without '_', or clone() before it"
                )


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


def _drop_buffer_update(graph_module: fx.GraphModule, node: fx.Node, written: fx.Node) -> None:
    if str(written.target).rpartition(".")[2] != "num_batches_tracked":
        raise CaptureError(
            f"{source_of(node)}: forward writes into '{written.target}'; "
            "state that changes in forward is only supported inside BatchNorm"
        )
    node.replace_all_uses_with(written)
    graph_module.graph.erase_node(node)


def _functional(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node:
    target = node.target
    assert isinstance(target, OpOverload)
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
