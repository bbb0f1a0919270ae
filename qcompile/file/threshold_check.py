"""What a `threshold` of a stored graph must be for targets to lower it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from ..errors import FileFormatError
from ..passes.threshold_op import MOST_LEVELS


def check_thresholds(graph: fx.Graph, constants: Mapping[str, Tensor]) -> None:
    """Look at the constants of every `threshold`; shapes are checked when the graph runs without data.

    Args:
        graph: a decoded graph.
        constants: what its get_attr nodes read.

    Raises:
        FileFormatError: if a sign is not +1 or -1, or thresholds do not ascend, or either is computed.
    """
    for node in graph.nodes:
        if node.target is torch.ops.qcompile.threshold.default:
            wrong = _wrong(node, constants)
            if wrong is not None:
                raise FileFormatError(f"node {node.name!r}: a threshold {wrong}")


def _wrong(node: fx.Node, constants: Mapping[str, Tensor]) -> str | None:
    if len(node.args) != 4 or node.kwargs:
        return "takes four arguments"
    given = []
    for one in node.args[1:3]:
        if not isinstance(one, fx.Node) or one.op != "get_attr":
            return "reads constants only"
        given.append(constants[str(one.target)])
    sign, levels = given
    if sign.dtype != torch.int8 or levels.dtype != torch.int32 or levels.dim() == 0:
        return "takes an int8 sign and int32 thresholds"
    if not 1 <= len(levels) <= MOST_LEVELS:
        return f"takes 1 to {MOST_LEVELS} levels, not {len(levels)}"
    if not bool((sign.abs() == 1).all()):
        return "has a sign that is neither 1 nor -1"
    if not bool((levels[1:] >= levels[:-1]).all()):
        return "has thresholds that do not ascend"
    return None
