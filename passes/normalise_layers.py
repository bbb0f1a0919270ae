"""Calls with weights become modules under the user's own names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

from torch import fx, nn

from qcompile.passes.aten import arguments_of, is_aten
from qcompile.passes.layer_from_node import Layer, Origin, layer_of
from qcompile.passes.manager import Pass, PassResult
from qcompile.passes.module_tree import attribute_at, module_at, place_module, tensor_at
from qcompile.passes.normalise_inplace import FUNCTIONAL


class LiftLayers(Pass):
    """`aten.conv2d(x, get_attr conv.weight, ...)` becomes `call_module conv (x,)`, and so for all weighted
    layers.

    The module is made from the call's own arguments, so a subclass of nn.Conv2d that pads by itself and calls
    F.conv2d with padding 0 becomes a convolution without padding. Calls that no module under the weight's own
    name can express (a computed weight, a weight under another attribute name, one weight with two
    geometries) stay as they are.

    Args:
        model: the (copied) user's model; norms take momentum and kind from its modules.
        training: whether the graph was traced in training mode.
        only: paths that may become modules; None: all.
    """

    requires = (FUNCTIONAL,)

    def __init__(self, model: nn.Module, training: bool, only: Collection[str] | None = None) -> None:
        self._model = model
        self._training = training
        self._only = only

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        found: dict[str, list[tuple[fx.Node, Layer]]] = defaultdict(list)
        for node in graph_module.graph.nodes:
            if is_aten(node):
                placed = self._layer_and_path(graph_module, node)
                if placed is not None:
                    found[placed[1]].append((node, placed[0]))
        notes: list[str] = []
        for path, calls in found.items():
            if self._only is not None and path not in self._only:
                continue
            layer = self._common(path, calls)
            if layer is None:
                notes.append(f"'{path}' is used with several geometries and stays a function")
                continue
            place_module(graph_module, path, _build(graph_module, layer))
            for node, own in calls:
                if own.key == layer.key:
                    replace_call(graph_module, node, path, (arguments_of(node)[own.input],))
        return PassResult(graph_module, bool(found), tuple(notes))

    def _layer_and_path(self, graph_module: fx.GraphModule, node: fx.Node) -> tuple[Layer, str] | None:
        inner = node.meta.get("module_path", "")
        owner = module_at(self._model, inner)
        layer = layer_of(node, Origin(lambda one: attribute_at(graph_module, one), owner, self._training))
        if layer is None:
            return None
        used = {name: node for name, node in layer.tensors if node is not None}
        if not used:
            return (layer, inner) if inner and isinstance(owner, layer.kind) else None
        first = next(iter(used.values()))
        for path in (inner, str(first.target).rpartition(".")[0]):
            if path and _owns(graph_module, path, layer):
                return layer, path
        return None

    def _common(self, path: str, calls: list[tuple[fx.Node, Layer]]) -> Layer | None:
        by_key: dict[tuple[Any, ...], Layer] = {layer.key: layer for _, layer in calls}
        if len(by_key) == 1:
            return calls[0][1]
        # a tied weight: the module that owns it decides, its other uses stay functions
        owner = module_at(self._model, path)
        own_kind = [layer for layer in by_key.values() if isinstance(owner, layer.kind)]
        return own_kind[0] if len(own_kind) == 1 else None


def _owns(graph_module: fx.GraphModule, path: str, layer: Layer) -> bool:
    """Whether the tensors of a layer are exactly the attributes of these names at a path."""
    for name, node in layer.tensors:
        there = tensor_at(graph_module, f"{path}.{name}")
        given = None if node is None else tensor_at(graph_module, str(node.target))
        if there is not given:
            return False
    return True


def _build(graph_module: fx.GraphModule, layer: Layer) -> nn.Module:
    module = layer.build()
    for name, node in layer.tensors:
        if node is None:
            continue
        tensor = tensor_at(graph_module, str(node.target))
        if isinstance(tensor, nn.Parameter) == (name in module._parameters):
            (module._parameters if name in module._parameters else module._buffers)[name] = tensor  # type: ignore[assignment]
        else:
            delattr(module, name)
            setattr(module, name, tensor) if isinstance(tensor, nn.Parameter) else module.register_buffer(
                name, tensor
            )
    # BatchNorm's counter comes with the state that stands at its path; a hand-written norm may have none
    if module._buffers.get("num_batches_tracked") is not None:
        del module._buffers["num_batches_tracked"]
    return module


def replace_call(
    graph_module: fx.GraphModule, node: fx.Node, target: str, inputs: tuple[fx.Node, ...]
) -> None:
    """Replace a call by `call_module target (*inputs)`."""
    with graph_module.graph.inserting_before(node):
        call = graph_module.graph.call_module(target, inputs)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    graph_module.graph.erase_node(node)


def replace_by_module(
    graph_module: fx.GraphModule,
    node: fx.Node,
    target: str,
    inputs: tuple[fx.Node, ...],
    build: Callable[[], nn.Module],
) -> None:
    """Replace a call by `call_module target (*inputs)`, making the module unless one stands there already."""
    if module_at(graph_module, target) is None:
        place_module(graph_module, target, build())
    replace_call(graph_module, node, target, inputs)
