"""Attention with dropout becomes a module that obeys train() and eval()."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from qcompile.passes.aten import arguments_of, is_aten
from qcompile.passes.attention import ScaledDotProductAttention
from qcompile.passes.manager import Pass, PassResult
from qcompile.passes.normalise_dropout import stateless_path
from qcompile.passes.normalise_layers import replace_by_module

_TENSORS = ("query", "key", "value", "attn_mask")
_SETTINGS = ("dropout_p", "is_causal", "scale", "enable_gqa")


def is_attention(node: fx.Node) -> bool:
    """Whether a node calls scaled dot product attention as a function."""
    return is_aten(node) and node.target is torch.ops.aten.scaled_dot_product_attention.default


def attention_call(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tensors and settings of an attention call; an absent mask is left out."""
    call = arguments_of(node)
    tensors = tuple(call[name] for name in _TENSORS if call[name] is not None)
    return tensors, {name: call[name] for name in _SETTINGS}


class LiftAttention(Pass):
    """`aten.scaled_dot_product_attention(q, k, v, mask, 0.1)` becomes `call_module (q, k, v, mask)`.

    For graphs traced in training mode; attention without dropout stays a function.

    Args:
        model: the (copied) user's model, which names the modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        for node in list(graph_module.graph.nodes):
            if not is_attention(node) or not arguments_of(node)["dropout_p"]:
                continue
            tensors, settings = attention_call(node)
            if any(isinstance(value, fx.Node) for value in settings.values()):
                continue
            target = stateless_path(
                self._model, graph_module, node, "attention", {"kind": ScaledDotProductAttention, **settings}
            )
            replace_by_module(
                graph_module,
                node,
                target,
                tensors,
                lambda settings=settings: ScaledDotProductAttention(**settings),  # type: ignore[misc]
            )
            modified = True
        return PassResult(graph_module, modified)
