"""What a tracer hands to normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Trace:
    """A traced model.

    Attributes:
        graph_module: calls on aten over placeholder and get_attr nodes; its output is a flat tuple of nodes.
            Nodes carry meta "source" ("file.py:12") and "module_path" (the user's module whose forward made
            the node).
        out_spec: structure of what the user's forward returns.
        out_values: one entry per leaf of it: a node of the graph, or a constant.
    """

    graph_module: fx.GraphModule
    out_spec: pytree.TreeSpec
    out_values: tuple[Any, ...]
