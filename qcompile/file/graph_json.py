"""Integer graphs as JSON, and back without running any code from the file.

Only operators on a list can be named: qcompile's own, aten operators that neither write to their inputs nor
touch anything outside of them, and size arithmetic. torch.fx writes names of nodes, inputs, constants and
keywords into source text, so each is held to what cannot be anything but a name.
"""

from __future__ import annotations

import keyword
import math
import operator
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import FileFormatError, LoweringError
from ..modes import Mode
from ..passes.integer_model import IntegerModel
from ..policy import Policy
from .operators import is_listed
from .threshold_check import check_thresholds

_SIZE_ARITHMETIC: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name) for name in ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg")
}

MAX_NODES = 100_000
_META_TYPES: dict[str, Any] = {
    **dict.fromkeys(("weight_bits", "code_low", "code_high"), int),
    "layer": str,
    "layers": list,
    "unit": (int, float),
    "weight_signed": bool,
    "dtype": torch.dtype,
}
_DTYPES = {str(one).removeprefix("torch."): one for one in (torch.float32, torch.float64, torch.float16)} | {
    str(one).removeprefix("torch."): one
    for one in (torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
}


def encode_graph(model: IntegerModel) -> list[Any]:
    """The graph as JSON values: one list [name, op, target, args, kwargs, meta] per node.

    Raises:
        LoweringError: if an operator may not stand in a file; names the layer.
    """
    return [_encode_node(node) for node in model.graph.nodes]


def _encode_node(node: fx.Node) -> list[Any]:
    layer = node.meta.get("layer", node.name)
    target = node.target if node.op != "call_function" else _operator_name(node)
    if node.op == "get_attr" and not _is_path(str(target)):
        raise LoweringError(
            f"layer {layer!r}: the name {target!r} cannot be stored in a file; rename the module"
        )
    meta = {key: _encode(node.meta[key]) for key in _META_TYPES if key in node.meta}
    kwargs = {key: value for key, value in node.kwargs.items() if not _is_placement(key, value)}
    try:
        return [node.name, node.op, target, _encode(list(node.args)), _encode(kwargs), meta]
    except LoweringError as cause:
        raise LoweringError(
            f"layer {layer!r}: operator {target}: {cause}; replace it in the model"
        ) from cause


def _is_placement(key: str, value: Any) -> bool:
    """Whether an argument says no more than where a tensor is made; graphs run where they are loaded."""
    return key in ("device", "layout", "pin_memory") and value in (
        (None, torch.device("cpu"), torch.strided, False)
    )


def _is_name(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)


def _is_path(text: str) -> bool:
    return text.isprintable() and not set('"\\') & set(text)


def _operator_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target._schema.name}.{target._overloadname}"
        if is_listed(target):
            return name
    else:
        for name, function in _SIZE_ARITHMETIC.items():
            if target is function:
                return f"python::{name}"
        name = str(target)
    layer = node.meta.get("layer", node.name)
    raise LoweringError(
        f"layer {layer!r}: operator {name} cannot be stored in a file; replace it in the model"
    )


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, (list, tuple)):
        return [_encode(one) for one in value]
    if isinstance(value, dict):
        return {"dict": [[str(key), _encode(one)] for key, one in value.items()]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, slice):
        return {"slice": [_encode(one) for one in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    raise LoweringError(f"a {type(value).__name__} argument cannot be stored in a file")


def decode_graph(nodes: Any, constants: Mapping[str, Tensor], mode: Mode | Policy) -> IntegerModel:
    """Rebuild an integer graph.

    Args:
        nodes: what `encode_graph` returned.
        constants: every constant that the graph reads.
        mode: the graph's mode.

    Raises:
        FileFormatError: for anything that `encode_graph` cannot have written.
    """
    if not isinstance(nodes, list) or not 0 < len(nodes) <= MAX_NODES:
        raise FileFormatError(f"the graph must be a list of 1 to {MAX_NODES} nodes")
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    for record in nodes:
        _decode_node(graph, record, known, constants)
    outputs = [node.op for node in known.values()].count("output")
    if outputs != 1 or next(reversed(known.values())).op != "output":
        raise FileFormatError("the graph must have one output, as its last node")
    check_thresholds(graph, constants)
    try:
        graph.lint()
        used = {
            str(node.target): constants[str(node.target)] for node in graph.nodes if node.op == "get_attr"
        }
        return IntegerModel(used, graph, mode)
    except (RuntimeError, AttributeError, SyntaxError, LookupError, TypeError, NameError) as cause:
        raise FileFormatError(f"the graph is inconsistent: {str(cause).splitlines()[0][:200]}") from cause


def _decode_node(
    graph: fx.Graph, record: Any, known: dict[str, fx.Node], constants: Mapping[str, Tensor]
) -> None:
    if not isinstance(record, list) or len(record) != 6:
        raise FileFormatError("a graph node must be a list of 6 entries")
    name, op, target, args, kwargs, meta = record
    if not (isinstance(name, str) and _is_name(name) and name not in known):
        raise FileFormatError(f"{reprlib.repr(name)} is no valid or no unused node name")
    if not isinstance(target, str):
        raise FileFormatError(f"node {name!r}: its target must be a string")
    callee: Any = target
    if op == "call_function":
        callee = _find_operator(target)
    elif op == "get_attr":
        if target not in constants or not _is_path(target):
            raise FileFormatError(
                f"node {name!r} reads the constant {target!r}, which the file does not hold"
            )
    elif op == "placeholder":
        if not _is_name(target):
            raise FileFormatError(f"input {reprlib.repr(target)} is no valid name")
    elif op != "output":
        raise FileFormatError(f"node {name!r}: {op!r} is no node kind of an integer graph")
    decoded = _decode(kwargs, known)
    if not isinstance(args, list) or not isinstance(decoded, dict) or not isinstance(meta, dict):
        raise FileFormatError(f"node {name!r}: malformed arguments")
    most, keywords = _signature(op, callee)
    if len(args) > most or not keywords.issuperset(decoded):
        raise FileFormatError(f"node {name!r}: {target} has no such arguments")
    node = graph.create_node(op, callee, tuple(_decode(one, known) for one in args), decoded, name=name)
    node.meta.update({key: _decode(meta[key], known) for key in _META_TYPES if key in meta})
    if not all(isinstance(node.meta[key], kind) for key, kind in _META_TYPES.items() if key in node.meta):
        raise FileFormatError(f"node {name!r}: malformed description")
    known[name] = node


def _signature(op: str, callee: Any) -> tuple[int, set[str]]:
    """How many arguments and which keywords a node of a graph may have."""
    if op != "call_function":
        return (1 if op == "output" else 0), set()
    if isinstance(callee, torch._ops.OpOverload):
        return len(callee._schema.arguments), {argument.name for argument in callee._schema.arguments}
    return 2, set()


def _find_operator(target: str) -> Any:
    namespace, _, rest = target.partition("::")
    name, _, overload = rest.partition(".")
    if namespace == "python" and rest in _SIZE_ARITHMETIC:
        return _SIZE_ARITHMETIC[rest]
    found = None
    if namespace in ("aten", "qcompile") and name.isidentifier():
        packet = getattr(getattr(torch.ops, namespace), name, None)
        if isinstance(packet, torch._ops.OpOverloadPacket) and (overload or "default") in packet.overloads():
            found = getattr(packet, overload or "default")
    if not isinstance(found, torch._ops.OpOverload) or not is_listed(found):
        raise FileFormatError(f"operator {target!r} may not stand in a file")
    return found


def _decode(value: Any, known: Mapping[str, fx.Node]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_decode(one, known) for one in value]
    if isinstance(value, dict) and len(value) == 1:
        kind, content = next(iter(value.items()))
        if kind == "node" and isinstance(content, str) and content in known:
            return known[content]
        if kind == "float" and content in ("inf", "-inf", "nan"):
            return float(content)
        if kind == "dict" and isinstance(content, list):
            pairs = [
                one for one in content if isinstance(one, list) and len(one) == 2 and isinstance(one[0], str)
            ]
            if len(pairs) == len(content):
                return {key: _decode(one, known) for key, one in pairs}
        if kind == "dtype" and content in _DTYPES:
            return _DTYPES[content]
        if kind == "slice" and isinstance(content, list) and len(content) == 3:
            return slice(*(_decode(one, known) for one in content))
        if kind == "memory_format" and content in ("contiguous_format", "preserve_format", "channels_last"):
            return getattr(torch, content)
    raise FileFormatError(f"malformed argument {str(value)[:80]}")
