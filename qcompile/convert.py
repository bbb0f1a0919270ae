"""`convert`: the integer graph of one mode or policy, as users get it."""

from __future__ import annotations

from copy import deepcopy

from torch import nn

from .modes import Mode
from .passes.integer_model import IntegerModel
from .policy import Policy
from .wrappers import as_one_graph


def convert(model: nn.Module, bits: int | str | Mode | Policy | None = None) -> IntegerModel:
    """The integer graph of one mode: a few integer operators, and whatever stays in float.

    Args:
        model: a prepared or loaded model; it must have seen inputs, or been prepared with examples.
        bits: the mode or policy; default: the active one.

    Returns:
        A copy of the graph that the model runs in eval mode; called with flat tensors, it returns a tuple.

    Raises:
        InvalidArgument: if the mode was not prepared, the policy is another model's, or input shapes are
            unknown.
        InvalidInputType: if the model was neither prepared nor loaded.
        FoldError: if activation steps were never set, or integers exceed what the contract allows.
    """
    checked = as_one_graph(model)
    return deepcopy(checked.integer_model(checked.chosen(bits)))
