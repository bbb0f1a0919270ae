"""Differences between an artefact's constants and nodes and those of a fresh conversion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from ..passes.integer_model import IntegerModel
from .chain import as_array

#: What nodes carry besides their arguments, for lowering.
METADATA = ("unit", "weight_bits", "weight_signed", "code_low", "code_high")


def graph_differences(expected: IntegerModel, actual: IntegerModel) -> list[str]:
    """One line per node or constant of `actual` that differs from `expected`, in graph order."""
    lines: list[str] = []
    if expected.mode != actual.mode:
        lines.append(f"the graph is of mode {actual.mode.label}, expected {expected.mode.label}")
    theirs = {node.name: node for node in actual.graph.nodes}
    layers = _layers_of_constants(expected)
    for node in expected.graph.nodes:
        layer = layers.get(node.name) or str(node.meta.get("layer", node.name))
        if node.name not in theirs:
            lines.append(f"layer {layer!r}: node {node.name!r} is missing")
            continue
        other = theirs.pop(node.name)
        if node.op == "get_attr" and other.op == "get_attr":
            found = array_difference(as_array(expected.constant(node)), as_array(actual.constant(other)))
            if found is not None:
                lines.append(f"layer {layer!r}: constant {str(node.target)!r} {found}")
            if node.target != other.target:
                lines.append(f"layer {layer!r}: reads {other.target!r}, expected {node.target!r}")
        else:
            lines.extend(f"layer {layer!r}: {found}" for found in _node_differences(node, other))
    lines.extend(
        f"layer {node.meta.get('layer', name)!r}: node {name!r} is not expected"
        for name, node in theirs.items()
    )
    return lines


def constant_differences(
    expected: Mapping[str, NDArray[Any]], actual: Mapping[str, NDArray[Any]]
) -> list[str]:
    """One line per constant, keyed by `layer/what`, that differs."""
    lines = []
    for name in dict.fromkeys((*expected, *actual)):
        layer = name.rpartition("/")[0] or name
        if name not in actual:
            lines.append(f"layer {layer!r}: constant {name!r} is missing")
        elif name not in expected:
            lines.append(f"layer {layer!r}: constant {name!r} is not expected")
        else:
            found = array_difference(np.asarray(expected[name]), np.asarray(actual[name]))
            if found is not None:
                lines.append(f"layer {layer!r}: constant {name!r} {found}")
    return lines


def array_difference(expected: NDArray[Any], actual: NDArray[Any]) -> str | None:
    """Where two arrays differ first, or None if shapes, types and values are equal."""
    if expected.shape != actual.shape:
        return f"has shape {actual.shape}, expected {expected.shape}"
    if expected.dtype != actual.dtype:
        return f"is {actual.dtype}, expected {expected.dtype}"
    different = expected != actual
    if expected.dtype.kind in "fc":
        different &= ~(np.isnan(expected) & np.isnan(actual))
    count = int(np.count_nonzero(different))
    if not count:
        return None
    index = tuple(int(one) for one in np.argwhere(different)[0])
    where = f"at {list(index)} " if index else ""
    more = f" ({count} entries differ)" if count > 1 else ""
    return f"{where}is {actual[index]}, expected {expected[index]}{more}"


def _layers_of_constants(graph: IntegerModel) -> dict[str, str]:
    """For every get_attr node the layer that reads it first, and what that layer follows."""
    layers: dict[str, str] = {}
    for node in graph.graph.nodes:
        for one in node.all_input_nodes:
            if one.op == "get_attr":
                layers.setdefault(one.name, str(node.meta.get("layer", node.name)))
    return layers


def _node_differences(expected: fx.Node, actual: fx.Node) -> list[str]:
    if (expected.op, str(expected.target)) != (actual.op, str(actual.target)):
        return [f"calls {actual.target}, expected {expected.target}"]
    lines = []
    names = _argument_names(expected)
    ours, theirs = _plain(expected.args), _plain(actual.args)
    if len(ours) != len(theirs):
        lines.append(f"has {len(theirs)} arguments, expected {len(ours)}")
    for position, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            name = names[position] if position < len(names) else f"argument {position}"
            lines.append(f"{name} is {b}, expected {a}")
    if _plain(expected.kwargs) != _plain(actual.kwargs):
        lines.append(f"options are {_plain(actual.kwargs)}, expected {_plain(expected.kwargs)}")
    for key in METADATA:
        if key in expected.meta and key in actual.meta and expected.meta[key] != actual.meta[key]:
            lines.append(f"{key} is recorded as {actual.meta[key]}, expected {expected.meta[key]}")
    return lines


def _argument_names(node: fx.Node) -> list[str]:
    schema = getattr(node.target, "_schema", None)
    return [] if schema is None else [argument.name for argument in schema.arguments]


def _plain(value: Any) -> Any:
    """Arguments with nodes replaced by their names, lists and tuples alike."""
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, slice):
        return ["slice", _plain(value.start), _plain(value.stop), _plain(value.step)]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
