"""Any other float operator, translated by torch's own ONNX exporter, one operator at a time."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from onnx import compose, inliner, version_converter
from torch import fx

from qcompile.errors import LoweringError

from .emit import Emitter, layer_of
from .graph import OPSET
from .values import Plain, Value


def torch_operator(emitter: Emitter, node: fx.Node) -> Value:
    """Emit an operator that has no form of its own here.

    Raises:
        LoweringError: if torch cannot express it either, or it reads quantised integers.
    """
    sources = [one for one in node.all_input_nodes if emitter.is_tensor(one)]
    names = [emitter.tensor(one) for one in sources]
    exported = _export(emitter, node, sources)
    if emitter.builder.opset != OPSET:
        exported = version_converter.convert_version(exported, emitter.builder.opset)
    exported = compose.add_prefix(exported, f"{layer_of(node)}/{node.name}.")
    for name, inner in zip(names, exported.graph.input, strict=True):
        emitter.builder.node("Identity", [name], inner.name, f"{layer_of(node)}/input")
    emitter.builder.adopt(exported.graph.node, exported.graph.initializer)
    results = tuple(Plain(one.name) for one in exported.graph.output)
    return results if emitter.is_tuple(node) else results[0]


def _export(emitter: Emitter, node: fx.Node, sources: list[fx.Node]) -> onnx.ModelProto:
    layer, operator = layer_of(node), emitter.model.operator_name(node) or str(node.target)
    graph = fx.Graph()
    inner = {one: graph.placeholder(f"x{index}") for index, one in enumerate(sources)}
    graph.output(graph.node_copy(node, lambda one: inner[one] if one in inner else emitter.value(one)))
    examples = tuple(emitter.example(one) for one in sources)
    module = fx.GraphModule({}, graph).eval()
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module, examples, dynamo=True, opset_version=OPSET, verbose=False, optimize=True
            )
        assert program is not None
        exported = inliner.inline_local_functions(program.model_proto)
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as cause:
        raise LoweringError(
            f"layer {layer!r}: operator {operator} has no form in ONNX; "
            "replace it in the model or lower to another target"
        ) from cause
    if any(one.domain == "" and one.version != OPSET for one in exported.opset_import):
        raise LoweringError(f"layer {layer!r}: operator {operator} has no form in ONNX opset {OPSET}")
    return exported


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks about packages and modes that do not matter for one operator."""
    logger = logging.getLogger("torch.onnx")
    level: Any = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
