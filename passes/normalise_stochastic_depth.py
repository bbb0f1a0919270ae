"""Stochastic depth in the spellings of torchvision, timm and older code becomes one module."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import torch
from torch import fx, nn

from qcompile.passes.aten import arguments_of, is_aten
from qcompile.passes.manager import Pass, PassResult
from qcompile.passes.normalise_dropout import stateless_path
from qcompile.passes.normalise_layers import replace_by_module
from qcompile.passes.stochastic_depth import StochasticDepth

_aten = torch.ops.aten
_EMPTY = (_aten.empty.memory_format, _aten.new_empty.default)
_ONE_VALUE = (_aten.full.default, _aten.new_full.default)
_DIVIDE = (_aten.div.Tensor, _aten.div.Scalar)
_ADD = (_aten.add.Tensor, _aten.add.Scalar)


@dataclass(frozen=True)
class _Mask:
    """A random tensor of zeros and ones with one value per sample ("row") or one in all ("batch")."""

    survival: float
    mode: Literal["row", "batch"]


class LiftStochasticDepth(Pass):
    """`x * bernoulli(q)`, `x * bernoulli(q) / q`, `x / q * floor(q + rand)` become `StochasticDepth(1 - q)`.

    The random tensor must have one value per sample, shape [batch, 1, ..., 1], or one in all, [1, 1, ..., 1].

    Args:
        model: the (copied) user's model, which names the modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        notes: list[str] = []
        for node in list(graph_module.graph.nodes):
            match = _wrapped(node)
            if is_aten(node) and node.target is _aten.mul.Tensor:
                match = _product(node.args[0], node.args[1]) or _product(node.args[1], node.args[0])
            if match is None:
                continue
            x, mask, scale = match
            if mask.survival == 1.0:
                node.replace_all_uses_with(x)
                graph_module.graph.erase_node(node)
                continue
            settings: dict[str, Any] = {
                "p": round(1.0 - mask.survival, 12),
                "mode": mask.mode,
                "scale": scale,
            }
            target = stateless_path(
                self._model, graph_module, node, "stochastic_depth", {"kind": StochasticDepth, **settings}
            )
            replace_by_module(
                graph_module,
                node,
                target,
                (x,),
                lambda settings=settings: StochasticDepth(**settings),  # type: ignore[misc]
            )
            notes.append(f"'{target}' is stochastic depth with p={settings['p']}")
        return PassResult(graph_module, bool(notes), tuple(notes))


def _wrapped(node: fx.Node) -> tuple[fx.Node, _Mask, bool] | None:
    """Match torchvision's function, which symbolic tracing keeps as one call."""
    if node.op != "call_function" or getattr(node.target, "__name__", "") != "stochastic_depth":
        return None
    call = dict(zip(("input", "p", "mode", "training"), node.args, strict=False)) | node.kwargs
    x, p, mode = call["input"], call["p"], call["mode"]
    if not isinstance(x, fx.Node) or not isinstance(p, (int, float)) or mode not in ("row", "batch"):
        return None
    return x, _Mask(1.0 - p if call.get("training", True) else 1.0, mode), True  # type: ignore[arg-type]


def _product(x: Any, random: Any) -> tuple[fx.Node, _Mask, bool] | None:
    """Match x * random; returns the branch, the mask, and whether the result is scaled by 1 / survival."""
    if not isinstance(x, fx.Node):
        return None
    mask = _mask(random)
    if mask is not None:
        if _calls(x, _DIVIDE) and x.args[1] == mask.survival and isinstance(x.args[0], fx.Node):
            return x.args[0], mask, True
        return x, mask, False
    if _calls(random, _DIVIDE):
        mask = _mask(random.args[0])
        if mask is not None and random.args[1] == mask.survival:
            return x, mask, True
    return None


def _mask(node: Any) -> _Mask | None:
    if _calls(node, (_aten.bernoulli.p,)) and _calls(node.args[0], _EMPTY):
        return _shaped(arguments_of(node)["p"], arguments_of(node.args[0])["size"])
    if _calls(node, (_aten.bernoulli.default,)) and _calls(node.args[0], _ONE_VALUE):
        call = arguments_of(node.args[0])
        return _shaped(call["fill_value"], call["size"])
    if _calls(node, (_aten.floor.default,)) and _calls(node.args[0], _ADD):
        for noise, survival in (node.args[0].args[:2], node.args[0].args[1::-1]):
            if _calls(noise, (_aten.rand.default,)):
                return _shaped(survival, arguments_of(noise)["size"])
    return None


def _shaped(survival: Any, size: Any) -> _Mask | None:
    if not isinstance(survival, float) or not 0.0 <= survival <= 1.0:
        return None
    if isinstance(size, fx.Node) and size.target is operator.add:
        # without examples "(x.shape[0],) + (1,) * (x.ndim - 1)" is not evaluated
        first, ones = size.args[:2]
        if isinstance(first, (list, tuple)) and _calls(ones, (operator.mul,)) and ones.args[0] in ((1,), [1]):
            size = first
    if isinstance(size, (list, tuple)) and size and all(one == 1 for one in size[1:]):
        if size[0] == 1:
            return _Mask(survival, "batch")
        if isinstance(size[0], fx.Node):
            return _Mask(survival, "row")
    return None


def _calls(node: Any, targets: tuple[Any, ...]) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets
