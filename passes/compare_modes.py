"""The graphs of training and evaluation must be one graph; dropout and stochastic depth may differ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qcompile.errors import CaptureError
from qcompile.passes.aten import RECURRENT, aten_name
from qcompile.passes.attention import ScaledDotProductAttention
from qcompile.passes.eval_identities import IDENTITIES_IN_EVAL
from qcompile.passes.module_tree import CONSTANTS, module_at, tensor_at
from qcompile.passes.normalise_attention import attention_call, is_attention
from qcompile.passes.source_lines import source_of


def check_same_in_both_modes(training: fx.GraphModule, evaluation: fx.GraphModule) -> None:
    """Compare two canonical graphs of one model.

    Args:
        training: the graph traced in training mode.
        evaluation: the graph traced in evaluation mode.

    Raises:
        CaptureError: naming the user's line of the first difference.
    """
    same: dict[fx.Node, Any] = {}  # node of the training graph -> what stands for it in the other
    rest = iter(node for node in evaluation.graph.nodes if node.op != "get_attr")
    other: fx.Node | None = None
    for node in training.graph.nodes:
        if node.op == "get_attr":
            continue
        if node.op == "call_module" and isinstance(module_at(training, str(node.target)), IDENTITIES_IN_EVAL):
            same[node] = same.get(node.args[0], node.args[0])
            continue
        other = next(rest, None)
        if other is None or not _equal(node, other, training, evaluation, same):
            raise CaptureError(_difference(node, other))
        same[node] = other
    extra = next(rest, None)
    if extra is not None:
        raise CaptureError(_difference(None, extra))


def _equal(
    node: fx.Node,
    other: fx.Node,
    training: fx.GraphModule,
    evaluation: fx.GraphModule,
    same: dict[fx.Node, Any],
) -> bool:
    def match(left: Any, right: Any) -> bool:
        if isinstance(left, fx.Node) and isinstance(right, fx.Node):
            if left.op == "get_attr":
                return right.op == "get_attr" and _equal_state(left, right, training, evaluation)
            return same.get(left) is right
        if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
            return len(left) == len(right) and all(map(match, left, right))
        if isinstance(left, dict) and isinstance(right, dict):
            return left.keys() == right.keys() and all(match(left[key], right[key]) for key in left)
        if isinstance(left, slice) and isinstance(right, slice):
            return all(map(match, (left.start, left.stop, left.step), (right.start, right.stop, right.step)))
        return type(left) is type(right) and bool(left == right)

    attention = module_at(training, str(node.target)) if node.op == "call_module" else None
    if isinstance(attention, ScaledDotProductAttention) and is_attention(other):
        tensors, settings = attention_call(other)
        drops_nothing = settings.pop("dropout_p") == 0.0
        settings_equal = all(getattr(attention, name) == value for name, value in settings.items())
        return drops_nothing and settings_equal and match(node.args, tensors)
    if node.op != other.op:
        return False
    if node.op == "placeholder":
        return node.name == other.name
    if node.op != "output" and node.target != other.target:
        return False

    return match(node.args, other.args) and match(node.kwargs, other.kwargs)


def _equal_state(left: fx.Node, right: fx.Node, training: fx.GraphModule, evaluation: fx.GraphModule) -> bool:
    if not str(left.target).startswith(f"{CONSTANTS}."):
        return left.target == right.target
    # constants made in forward are numbered per trace, so their names say nothing
    one, other = tensor_at(training, str(left.target)), tensor_at(evaluation, str(right.target))
    return (
        isinstance(one, Tensor)
        and isinstance(other, Tensor)
        and one.dtype == other.dtype
        and torch.equal(one, other)
    )


def _difference(node: fx.Node | None, other: fx.Node | None) -> str:
    """One line about the first pair that differs; None stands for the end of a graph."""
    mine, its = _in_words(node), _in_words(other)
    if node is not None and node.op != "output":
        line = source_of(node)
        what = f"calls {mine} with other arguments than evaluation"
        if mine != its:
            what = f"does {mine} where evaluation does {its}"
    elif other is not None and other.op != "output":
        line, what = source_of(other), f"lacks {its} of evaluation"
    else:
        line, what = "forward", "returns something else than evaluation"
    if other is not None and aten_name(other) in RECURRENT:
        return f"{line}: a recurrent layer drops values between its layers in training; set its dropout to 0"
    return (
        f"{line}: training {what}; only dropout, stochastic depth and batch norm may differ: switch the "
        "rest off, for example auxiliary heads with aux_logits=False, or pass training=self.training to "
        "functional dropout"
    )


def _in_words(node: fx.Node | None) -> str:
    if node is None or node.op == "output":
        return "nothing"
    if node.op == "call_module":
        return f"layer '{node.target}'"
    return str(getattr(node.target, "__name__", node.target))
