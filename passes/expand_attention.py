"""Attention as products, so that their factors can be quantised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile.errors import InvalidArgument

from .attention import ScaledDotProductAttention
from .manager import Pass, PassResult
from .module_tree import free_name, place_module
from .normalise_attention import attention_call, is_attention
from .tensor_shapes import tensors_of

_ATEN = torch.ops.aten


class ExpandAttention(Pass):
    """`scaled_dot_product_attention` becomes a product, scale, mask, softmax, dropout and a product.

    An attention over a causal mask whose size depends on the inputs stays as it is, and so does every
    attention of a graph that was captured without examples.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite in place."""
        found = [node for node in graph_module.graph.nodes if _settings(graph_module, node) is not None]
        if not found:
            return PassResult(graph_module, False)
        try:
            tensors = tensors_of(graph_module)
        except InvalidArgument:
            return PassResult(graph_module, False)
        open_sizes = any(
            isinstance(size, torch.SymInt)
            for node in graph_module.graph.find_nodes(op="placeholder")
            for size in getattr(node.meta.get("val"), "shape", ())[1:]
        )
        modified = False
        for node in found:
            settings = _settings(graph_module, node)
            assert settings is not None
            if not (settings["is_causal"] and open_sizes):
                _expand(graph_module, node, settings, tensors)
                modified = True
        return PassResult(graph_module, modified)


def _settings(graph_module: fx.GraphModule, node: fx.Node) -> Mapping[str, Any] | None:
    """Tensors and settings of an attention, None for other nodes."""
    names = ("query", "key", "value", "mask")
    if is_attention(node):
        tensors, settings = attention_call(node)
        return {**dict(zip(names, tensors, strict=False)), **settings}
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        if isinstance(module, ScaledDotProductAttention):
            tensors = tuple(node.args)
            keys = ("dropout_p", "is_causal", "scale", "enable_gqa")
            settings = {key: getattr(module, key) for key in keys}
            return {**dict(zip(names, tensors, strict=False)), **settings}
    return None


def _expand(
    graph_module: fx.GraphModule,
    node: fx.Node,
    settings: Mapping[str, Any],
    tensors: Mapping[fx.Node, Tensor],
) -> None:
    graph = graph_module.graph
    query, key, value = (settings[name] for name in ("query", "key", "value"))

    def call(target: Any, *args: Any, name: str = "attention") -> fx.Node:
        made = graph.create_node("call_function", target, args, {}, f"{node.name}_{name}")
        made.meta = {key: entry for key, entry in node.meta.items() if key != "val"}
        return made

    with graph.inserting_before(node):
        groups = tensors[query].shape[-3] // tensors[key].shape[-3] if settings["enable_gqa"] else 1
        if groups > 1:
            key, value = (call(_ATEN.repeat_interleave.self_int, one, groups, -3) for one in (key, value))
        scores = call(_ATEN.matmul.default, query, call(_ATEN.transpose.int, key, -2, -1), name="scores")
        scale = settings["scale"]
        scale = 1.0 / math.sqrt(tensors[query].shape[-1]) if scale is None else scale
        scores = call(_ATEN.mul.Tensor, scores, scale)
        mask = settings.get("mask")
        if settings["is_causal"]:
            length, other = tensors[query].shape[-2], tensors[settings["key"]].shape[-2]
            name = free_name(graph_module, "causal_mask")
            hidden = torch.ones(length, other, dtype=torch.bool, device=tensors[query].device).triu(1)
            graph_module.register_buffer(name, hidden, persistent=False)
            scores = call(_ATEN.masked_fill.Scalar, scores, graph.get_attr(name), -math.inf)
        if mask is not None and tensors[mask].dtype == torch.bool:
            scores = call(_ATEN.masked_fill.Scalar, scores, call(_ATEN.logical_not.default, mask), -math.inf)
        elif mask is not None:
            scores = call(_ATEN.add.Tensor, scores, mask)
        weights = call(_ATEN.softmax.int, scores, -1)
        if node.op == "call_module":
            place_module(graph_module, str(node.target), nn.Dropout(settings["dropout_p"]))
            weights = graph.call_module(str(node.target), (weights,))
        result = call(_ATEN.matmul.default, weights, value, name="mixture")
    node.replace_all_uses_with(result)
    graph.erase_node(node)
