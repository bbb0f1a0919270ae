"""From a graph of kernels to a Relax module: import, legalise and fuse what has no kernel, plan memory."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx
from tvm.relax.frontend.torch import from_exported_program

from qcompile.errors import LoweringError

from . import kernel_op
from .api import relax, tvm
from .imported import CONVERTERS, check_operators


def import_graph(graph: fx.GraphModule, shapes: tuple[tuple[int, ...], ...]) -> Any:
    """The graph as one Relax module.

    Raises:
        LoweringError: if TVM cannot import an operator; names its layer.
    """
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    examples = tuple(
        torch.zeros(shape, dtype=node.meta.get("dtype", torch.float32))
        for node, shape in zip(inputs, shapes, strict=True)
    )
    program = torch.export.export(graph, examples, strict=False)

    check_operators(program)

    def convert(node: fx.Node, importer: Any) -> Any:
        kernel = kernel_op.find(node.args[1])
        given = relax.Tuple([importer.env[one] for one in node.args[0]])
        function = importer.block_builder.add_func(kernel.build(kernel.name), kernel.name)
        types = [relax.TensorType(shape, dtype) for shape, dtype in kernel.outputs]
        called = importer.block_builder.emit(
            relax.call_tir(function, given, types if len(types) > 1 else types[0])
        )
        return called if len(types) > 1 else importer.block_builder.emit(relax.Tuple([called]))

    try:
        return from_exported_program(
            program,
            custom_convert_map={**CONVERTERS, "kernel.default": convert},
            run_ep_decomposition=_has_operators(graph),
        )
    except (AssertionError, NotImplementedError, ValueError, TypeError, KeyError) as cause:
        reason = " ".join(str(cause).split())
        raise LoweringError(f"{culprits(graph, reason)}: TVM cannot import it; lower to onnx-qdq") from cause


def _has_operators(graph: fx.GraphModule) -> bool:
    """Whether operators of torch are left, which may have to be decomposed before TVM knows them."""
    return any(
        isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten"
        for node in graph.graph.nodes
    )


def culprits(graph: fx.GraphModule, reason: str) -> str:
    """Layers whose operators an error of the importer mentions."""
    words = set(re.split(r"[^A-Za-z0-9_]+", reason))
    found = [
        f"layer {str(node.meta.get('layer', node.name))!r}"
        for node in graph.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and node.target._schema.name.startswith("aten::")
        and node.target._schema.name.removeprefix("aten::") in words
    ]
    return ", ".join(dict.fromkeys(found)) or f"an operator ({reason[:200]})"


def optimise(module: Any, target: Any) -> Any:
    """Legalise, fuse, and call kernels with memory allocated for them."""
    passes = [
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ]
    with target:
        return tvm.transform.Sequential(passes)(module)
