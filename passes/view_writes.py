"""How a write into a view changes the tensor behind it, as operators without side effects.

`y[:, 0] = x` writes into `select(y, 1, 0)`; afterwards y is `select_scatter(y, x, 1, 0)`. Views that show
every element, in another order or shape, have an inverse: after a write into `transpose(y)`, y is the
transpose of that view. Chains of views are followed back one by one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.passes.aten import SLICE_END, arguments_of, aten_name, is_whole_slice

_aten = torch.ops.aten

#: What gives several views of one tensor.
SEVERAL = frozenset(
    ("unbind", "split", "split_with_sizes", "chunk", "tensor_split", "hsplit", "vsplit", "dsplit")
)

#: Views that leave some of the elements out.
PARTIAL = frozenset(("select", "slice", "narrow", "diagonal"))


class WrittenView:
    """A view that was written into.

    Args:
        node: the view; of an operator that gives several, the `getitem` that picks one.
        base: the tensor behind it, before the write.
        value: the view's new value.
        write: the write; new nodes go in front of it.
    """

    def __init__(self, node: fx.Node, base: fx.Node, value: fx.Node, write: fx.Node) -> None:
        self.node, self.base, self.value, self._write = node, base, value, write
        self.made: list[fx.Node] = []

    def tensor_behind(self) -> fx.Node | None:
        """The tensor behind the view after the write; None if no operator is known to compute it."""
        if self.node.target is operator.getitem:
            found = _of_several(self)
        else:
            rule = _RULES.get(aten_name(self.node))
            found = None if rule is None else rule(self)
        if found is not None and found is not self.value and "val" in self.base.meta:
            found.meta["val"] = self.base.meta["val"]
        return found

    @property
    def given(self) -> dict[str, Any]:
        """Arguments of the view."""
        return arguments_of(self.node)

    def call(self, target: Any, *args: Any) -> fx.Node:
        """A new node."""
        graph = self._write.graph
        with graph.inserting_before(self._write):
            node = graph.call_function(target, args)
        node.meta = {key: one for key, one in self._write.meta.items() if key != "val"}
        self.made.append(node)
        return node

    def scattered(self, target: Any, *args: Any) -> fx.Node:
        """The base with the view's new value in its place."""
        return self.call(target, self.base, self.value, *args)


def shape_as_arguments(like: fx.Node, call: Callable[..., fx.Node]) -> list[Any] | None:
    """The sizes of a tensor for `reshape`: numbers, one open size as -1, others computed.

    Args:
        like: the tensor.
        call: makes a node of a target and arguments.

    Returns:
        None if the graph was captured without examples.
    """
    value = like.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    sizes: list[Any] = []
    for dimension, size in enumerate(value.shape):
        if not isinstance(size, torch.SymInt):
            sizes.append(int(size))
        elif -1 not in sizes:
            sizes.append(-1)
        else:
            sizes.append(call(_aten.sym_size.int, like, dimension))
    return sizes


def _of_several(view: WrittenView) -> fx.Node | None:
    container, index = view.node.args
    if not isinstance(container, fx.Node) or type(index) is not int or index < 0:
        return None
    given, parts = arguments_of(container), container.meta.get("val")
    if "dim" not in given:
        return None
    if aten_name(container) == "unbind":
        return view.scattered(_aten.select_scatter.default, given["dim"], index)
    size = given.get("split_size", given.get("split_sizes"))
    if type(size) is int:
        start, stop = index * size, (index + 1) * size
    else:
        sizes = size if isinstance(size, (list, tuple)) else None
        if sizes is None and isinstance(parts, (list, tuple)):
            sizes = [part.shape[given["dim"]] for part in parts]
        if sizes is None or any(type(one) is not int for one in sizes[: index + 1]):
            return None
        start, stop = sum(sizes[:index]), sum(sizes[: index + 1])
    return view.scattered(_aten.slice_scatter.default, given["dim"], start, stop)


def _select(view: WrittenView) -> fx.Node:
    return view.scattered(_aten.select_scatter.default, view.given["dim"], view.given["index"])


def _slice(view: WrittenView) -> fx.Node:
    if is_whole_slice(view.given):
        return view.value
    span = (view.given[key] for key in ("dim", "start", "end", "step"))
    return view.scattered(_aten.slice_scatter.default, *span)


def _narrow(view: WrittenView) -> fx.Node | None:
    start, length = view.given["start"], view.given["length"]
    if type(start) is int and type(length) is int:
        stop = (start + length) or SLICE_END  # from -2 on, two elements: up to the end
    elif view.node.target is _aten.narrow.default:
        stop = view.call(operator.add, start, length)
    else:
        return None  # from a tensor on
    return view.scattered(_aten.slice_scatter.default, view.given["dim"], start, stop)


def _diagonal(view: WrittenView) -> fx.Node:
    where = (view.given[key] for key in ("offset", "dim1", "dim2"))
    return view.scattered(_aten.diagonal_scatter.default, *where)


def _again(view: WrittenView) -> fx.Node:
    assert callable(view.node.target)
    return view.call(view.node.target, view.value, *view.node.args[1:])


def _permute(view: WrittenView) -> fx.Node:
    dims = [one % len(view.given["dims"]) for one in view.given["dims"]]
    return view.call(_aten.permute.default, view.value, [dims.index(one) for one in range(len(dims))])


def _movedim(view: WrittenView) -> fx.Node:
    return view.call(view.node.target, view.value, view.given["destination"], view.given["source"])


def _unsqueeze(view: WrittenView) -> fx.Node:
    return view.call(_aten.squeeze.dim, view.value, view.given["dim"])


def _reshape(view: WrittenView) -> fx.Node | None:
    if view.node.target is _aten.view.dtype:
        return None
    sizes = shape_as_arguments(view.base, view.call)
    return None if sizes is None else view.call(_aten.reshape.default, view.value, sizes)


def _same(view: WrittenView) -> fx.Node:
    return view.value


#: By aten's name of the view: the tensor behind it after the write.
_RULES: dict[str, Callable[[WrittenView], fx.Node | None]] = {
    "select": _select,
    "slice": _slice,
    "narrow": _narrow,
    "diagonal": _diagonal,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "t", "numpy_T", "mT"), _again),
    "permute": _permute,
    **dict.fromkeys(("movedim", "moveaxis"), _movedim),
    "unsqueeze": _unsqueeze,
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze", "ravel"), _reshape),
    **dict.fromkeys(("view_as", "reshape_as"), _reshape),
    **dict.fromkeys(("alias", "lift_fresh", "contiguous", "to", "type_as"), _same),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"), _same),
}
