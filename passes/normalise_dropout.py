"""Dropout in every spelling becomes a module that obeys train() and eval()."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from qcompile.passes.aten import arguments_of, is_aten
from qcompile.passes.manager import Pass, PassResult
from qcompile.passes.module_tree import module_at
from qcompile.passes.normalise_layers import replace_by_module

_aten = torch.ops.aten
_KINDS: dict[Any, tuple[type[nn.Module], ...]] = {
    _aten.dropout.default: (nn.Dropout,),
    _aten.feature_dropout.default: (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    _aten.alpha_dropout.default: (nn.AlphaDropout,),
    _aten.feature_alpha_dropout.default: (nn.FeatureAlphaDropout,),
}


class LiftDropout(Pass):
    """`aten.dropout(x, p, True)` becomes `call_module (x,)`.

    For graphs traced in training mode. A graph traced in evaluation has a dropout left only if the model
    drops in evaluation too; it stays a function there, so the comparison of both graphs reports it.

    Args:
        model: the (copied) user's model, which names the modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        for node in list(graph_module.graph.nodes):
            if not is_aten(node) or node.target not in _KINDS:
                continue
            call = arguments_of(node)
            if call["train"] is not True or not isinstance(call["input"], fx.Node):
                continue
            kind = self._kind(node, call["input"])
            target = stateless_path(
                self._model, graph_module, node, "dropout", {"kind": kind, "p": call["p"]}
            )
            replace_by_module(
                graph_module,
                node,
                target,
                (call["input"],),
                lambda kind=kind, p=call["p"]: kind(p),  # type: ignore[misc]
            )
            modified = True
        return PassResult(graph_module, modified)

    def _kind(self, node: fx.Node, x: fx.Node) -> type[nn.Module]:
        kinds = _KINDS[node.target]
        owner = module_at(self._model, node.meta.get("module_path", ""))
        named = [kind for kind in kinds if isinstance(owner, kind)]
        if named or len(kinds) == 1:
            return (named or list(kinds))[0]
        value = x.meta.get("val")
        rank = value.ndim if isinstance(value, torch.Tensor) else 4
        return {3: nn.Dropout1d, 5: nn.Dropout3d}.get(rank, nn.Dropout2d)


def stateless_path(
    model: nn.Module, graph_module: fx.GraphModule, node: fx.Node, kind: str, settings: dict[str, Any]
) -> str:
    """Path for a module without parameters that a call becomes.

    The user's own module if the call was made in one without parameters and children (nn.Dropout, DropPath);
    otherwise a new name below the module whose forward made the call. A path that is taken is shared if the
    module there has the same settings, which are compared as attributes ("kind" as its type).
    """
    inner = node.meta.get("module_path", "")
    owner = module_at(model, inner)
    own_module = bool(inner) and owner is not None and not owner._parameters and not any(owner.children())
    path = inner if own_module else f"{inner}.{kind}" if inner else kind
    candidate, number = path, 0
    while True:
        there = module_at(graph_module, candidate)
        if there is None and (candidate == inner or module_at(model, candidate) is None):
            return candidate
        # functional calls do not share: each is a place of its own
        if own_module and there is not None and _has(there, settings):
            return candidate
        number += 1
        candidate = f"{path}_{number}"


def _has(module: nn.Module, settings: dict[str, Any]) -> bool:
    return all(
        type(module) is value if name == "kind" else getattr(module, name, None) == value
        for name, value in settings.items()
    )
