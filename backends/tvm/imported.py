"""TVM's importer checked against torch: every operator of a graph, alone, on random inputs.

The importer does not see some arguments (`alpha` of a difference, a divisor of an average) and says nothing.
What a device computes must not depend on luck, so an operator that differs from torch is refused. Results are
kept beside compiled kernels: each different call is checked once.
"""

from __future__ import annotations

import hashlib
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from tvm.relax.frontend.torch import from_exported_program

from qcompile.backends.cache_folder import cache_folder
from qcompile.errors import LoweringError

from .api import relax, tvm

#: How far results may differ, relative to the largest: both are float32 in another order.
TOLERANCE = 1e-4

_known: set[str] = set()


def _scatter_add(node: fx.Node, importer: Any) -> Any:
    base, axis, index, source = (importer.env[one] if isinstance(one, fx.Node) else one for one in node.args)
    return importer.block_builder.emit(
        relax.op.scatter_elements(base, index, source, axis=axis, reduction="add")
    )


#: Operators that TVM has and its importer lacks.
CONVERTERS = {"scatter_add.default": _scatter_add}


def check_operators(program: torch.export.ExportedProgram) -> None:
    """Compare every aten operator of a program as TVM imports it with torch.

    Raises:
        LoweringError: if one differs or cannot be compiled; names its layer.
    """
    for node in program.graph.nodes:
        computes = isinstance(node.meta.get("val"), (Tensor, tuple, list))  # an assertion does not
        if computes and getattr(node.target, "namespace", "") == "aten":
            key = _key(node)
            if key not in _known and not _is_kept(key):
                _check(node)
                _keep(key)
            _known.add(key)


def _value(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def _key(node: fx.Node) -> str:
    def described(argument: Any) -> str:
        value = _value(argument)
        return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)

    arguments = pytree.tree_map(described, (node.args, node.kwargs))
    content = f"{torch.__version__} {tvm.__version__} {node.target} {arguments}"
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def _is_kept(key: str) -> bool:
    try:
        return (cache_folder() / f"{key}.checked").exists()
    except OSError:
        return False


def _keep(key: str) -> None:
    try:
        cache_folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        (cache_folder() / f"{key}.checked").touch()
    except OSError:
        pass  # a cache that cannot be written is no reason to fail


def _check(node: fx.Node) -> None:
    graph, inputs = fx.Graph(), []
    generator = torch.Generator().manual_seed(0)

    def placed(argument: Any) -> Any:
        value = _value(argument)
        if not isinstance(value, Tensor):
            return argument
        inputs.append(_random(value, generator))
        return graph.placeholder(f"input_{len(inputs)}")

    args, kwargs = pytree.tree_map(placed, (node.args, node.kwargs))
    result = graph.call_function(node.target, args, kwargs)
    count = len(node.meta["val"]) if isinstance(node.meta["val"], (tuple, list)) else 0
    parts = tuple(graph.call_function(operator.getitem, (result, i)) for i in range(count))
    graph.output(parts or (result,))
    module = fx.GraphModule(torch.nn.Module(), graph)
    try:
        try:
            expected = module(*inputs)
        except (IndexError, RuntimeError):  # indices of a table with one entry
            inputs = [one if one.is_floating_point() else torch.zeros_like(one) for one in inputs]
            expected = module(*inputs)
        found = _run(module, inputs)
    except Exception as cause:  # whatever TVM's importer, legalisation and code generators raise
        reason = " ".join(str(cause).split())[:160]
        raise LoweringError(f"{named(node)}: TVM cannot compile it ({reason}); lower to onnx-qdq") from cause
    for want, have in zip(expected, found, strict=True):
        largest = want.double().abs().nan_to_num(0, 0, 0).amax() if want.numel() else 0.0
        if not torch.allclose(
            have.double(), want.double(), rtol=0, atol=TOLERANCE * float(max(largest, 1e-30)), equal_nan=True
        ):
            raise LoweringError(f"{named(node)}: TVM computes something else than torch; lower to onnx-qdq")


def named(node: fx.Node) -> str:
    """A node as people know it: its layer, if that is known, and its operator."""
    kind = node.target._schema.name.removeprefix("aten::")
    return f"layer {str(node.meta.get('layer', node.name))!r} ({kind})"


def _random(value: Tensor, generator: torch.Generator) -> Tensor:
    if value.dtype.is_floating_point:
        return torch.randn(value.shape, generator=generator).to(value.dtype)
    return torch.randint(0, 2, value.shape, generator=generator).to(value.dtype)


def _run(module: fx.GraphModule, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    program = torch.export.export(module, tuple(inputs), strict=False)
    target = tvm.target.Target("llvm")
    imported = from_exported_program(program, custom_convert_map=CONVERTERS)
    compiled = tvm.compile(relax.transform.LegalizeOps()(imported), target=target)
    machine = relax.VirtualMachine(compiled, tvm.cpu())
    found = machine["main"](*(tvm.runtime.tensor(one.numpy()) for one in inputs))
    return tuple(torch.from_numpy(one.numpy().copy()) for one in found)
