"""Trace a model with torch.export into a graph over the user's own tree of parameters."""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind, InputSpec, OutputKind
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from qcompile.errors import CaptureError
from qcompile.passes.capture_errors import (
    SHAPES_LOGGER,
    TRACING_ERRORS,
    blocked,
    hard_coded_size,
    size_of_values,
    uncapturable,
)
from qcompile.passes.dataclass_outputs import register_dataclasses
from qcompile.passes.example_inputs import Examples
from qcompile.passes.module_tree import CONSTANTS, attribute_target, graph_module_of
from qcompile.passes.source_lines import line_of_stack, origin_of
from qcompile.passes.trace import Trace

_NO_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast

#: What torch.export says of a dataclass that nobody has told it of.
_UNKNOWN_TYPE = "which is not a known type"


def trace_with_export(model: nn.Module, examples: Examples) -> Trace:
    """Trace a model in its present mode.

    Args:
        model: a copy of the user's model.
        examples: its inputs; dimension 0 of every tensor of the size of the batch is dynamic, and so is what
            they leave open.

    Raises:
        CaptureError: naming the user's line, if torch.export cannot trace the model.
    """
    exported = _export(model, examples)
    signature = exported.graph_signature
    kinds = {spec.arg.name: spec for spec in signature.input_specs}
    graph = fx.Graph()
    environment: dict[fx.Node, Any] = {}
    constants: dict[str, Tensor] = {}
    given = iter(examples.tensors)
    for node in exported.graph.find_nodes(op="placeholder"):
        spec = kinds[node.name]
        if spec.kind is not InputKind.USER_INPUT:
            environment[node] = _state(graph, model, exported, spec, constants, node)
        elif isinstance(node.meta.get("val"), Tensor):
            environment[node] = graph.placeholder(node.name)
            environment[node].meta = {"val": node.meta["val"], "example_shape": tuple(next(given).shape)}
        else:
            environment[node] = node.meta.get("val")
    output = _copy(exported.graph_module, graph, environment)
    returned = [
        value
        for value, spec in zip(output, signature.output_specs, strict=True)
        if spec.kind is OutputKind.USER_OUTPUT
    ]
    graph.output(tuple(value for value in returned if isinstance(value, fx.Node)))
    graph_module = graph_module_of(model, graph, constants)
    assert exported.call_spec.out_spec is not None
    return Trace(graph_module, exported.call_spec.out_spec, tuple(returned))


def trace_settled(model: nn.Module, examples: Examples) -> tuple[Trace, Examples]:
    """Trace a model in its present mode, with only those inputs at batch 2 that have a batch.

    What was repeated may be no batch: a position, a mask. It is taken as it was given where the model fails
    otherwise, where its size became a number, and where it is a vector whose size has nothing to do with the
    batch.

    Args:
        model: a copy of the user's model.
        examples: its inputs, all that could be batches of 1 repeated.

    Returns:
        The trace, and the inputs with which it was made.

    Raises:
        CaptureError: as `trace_with_export`.
    """
    first, *others = examples.batched() or [0]
    doubtful = [index for index in others if index in examples.repeated]
    if not doubtful:
        return trace_with_export(model, examples), examples
    vectors = [index for index in doubtful if examples.tensors[index].ndim == 1]
    try:
        trace = trace_with_export(model, examples)
    except CaptureError:
        for fewer in (vectors, doubtful):
            with contextlib.suppress(CaptureError):
                given = examples.unrepeated(fewer)
                return trace_with_export(model, given), given
        raise
    sizes = [_first_size(node) for node in trace.graph_module.graph.find_nodes(op="placeholder")]
    alone = [
        index
        for index in doubtful
        if sizes[index] == "2" or (index in vectors and sizes[index] != sizes[first])
    ]
    if not alone:
        return trace, examples
    given = examples.unrepeated(alone)
    return trace_with_export(model, given), given


def _first_size(node: fx.Node) -> str:
    """Dimension 0 of an input: a number, or the name of an open size."""
    value = node.meta["val"]
    return str(value.shape[0]) if value.dim() else ""


def _export(model: nn.Module, examples: Examples) -> ExportedProgram:
    shapes, batched = ShapesCollection(), examples.batched()
    for index, (tensor, opened) in enumerate(zip(examples.tensors, examples.open, strict=True)):
        # the first batch must stay dynamic; another input of that size may be no batch (two scales)
        kind = Dim.DYNAMIC if batched[:1] == [index] else Dim.AUTO
        sizes: dict[int, Any] = {0: kind} if index in batched else {}
        for one in opened:
            if one.dim > 0 or index not in batched:
                sizes[one.dim] = Dim.DYNAMIC if one.exported is None else one.exported
        shapes[tensor] = sizes

    def trace() -> ExportedProgram:
        spec: Any = shapes  # accepted since torch 2.5, its annotation says otherwise
        return torch.export.export(model, examples.args, examples.kwargs, dynamic_shapes=spec, strict=False)

    with _quiet():
        try:
            return trace()
        except TRACING_ERRORS as error:
            if _UNKNOWN_TYPE in str(error) and register_dataclasses(model, examples):
                return _export(model, examples)
            if "specialized it to be a constant" in str(error):
                raise hard_coded_size(examples, str(error), trace) from error
            raise uncapturable(model, examples, error) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Export prints whole graphs on failure; our error says what matters in one line."""
    loggers = [logging.getLogger(name) for name in (SHAPES_LOGGER, "torch._subclasses.fake_tensor")]
    before = [one.disabled for one in loggers]
    for one in loggers:
        one.disabled = True
    printed = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(printed):
            warnings.filterwarnings("ignore", message=".*was assigned during export.*")
            yield
        sys.stderr.write(printed.getvalue())  # not on failure, which prints the whole graph
    finally:
        for one, disabled in zip(loggers, before, strict=True):
            one.disabled = disabled


def _state(
    graph: fx.Graph,
    model: nn.Module,
    exported: ExportedProgram,
    spec: InputSpec,
    constants: dict[str, Tensor],
    node: fx.Node,
) -> fx.Node:
    name = str(spec.target)
    if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
        target = attribute_target(model, name)
    elif spec.kind is InputKind.CONSTANT_TENSOR:
        flat = name.replace(".", "_")
        constants[flat] = exported.constants[name]
        target = f"{CONSTANTS}.{flat}"
    else:
        raise CaptureError(
            f"the model uses '{name}', a {spec.kind.name.lower()}, which is no tensor; remove it"
        )
    attribute = graph.create_node("get_attr", target)
    attribute.meta = {"val": node.meta.get("val")}
    return attribute


def _copy(source: fx.GraphModule, graph: fx.Graph, environment: dict[fx.Node, Any]) -> list[Any]:
    """Copy the nodes of a graph; returns the values of its output."""
    for node in source.graph.nodes:
        if node.op == "call_function" and node.target is _NO_GRAD:
            enabled, body, *inputs = node.args
            results = _inline(source, body, inputs, graph, environment)
            if not enabled:
                results = [_detached(graph, one) if isinstance(one, fx.Node) else one for one in results]
            environment[node] = results
        elif node.op == "call_function" and node.target is _AUTOCAST and not node.args[2]:
            body, *inputs = node.args[4:]
            environment[node] = _inline(source, body, inputs, graph, environment)
        elif node.op == "call_function":
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                raise _blocked(source, node)
            environment[node] = _copy_call(node, graph, environment)
        elif node.op == "output":
            return list(fx.map_arg(node.args[0], lambda used: environment[used]))  # type: ignore[arg-type]
    raise CaptureError("torch.export returned a graph without output; this torch version is not supported")


def _blocked(source: fx.GraphModule, node: fx.Node) -> CaptureError:
    """The error for a block of the user's code that torch.export keeps as one (autocast, cond)."""
    bodies = [
        getattr(source, str(argument.target))
        for argument in node.all_input_nodes
        if argument.op == "get_attr"
    ]
    stacks = [
        one.meta.get("stack_trace") for body in bodies for one in getattr(body, "graph", fx.Graph()).nodes
    ]
    lines = map(line_of_stack, [node.meta.get("stack_trace"), *stacks])
    return blocked(next(filter(None, lines), None), str(node.target).removeprefix("wrap_with_"))


def _copy_call(node: fx.Node, graph: fx.Graph, environment: dict[fx.Node, Any]) -> Any:
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        container = environment[node.args[0]]
        if isinstance(container, list):
            return container[node.args[1]]  # type: ignore[index]
    args = fx.map_arg(node.args, lambda used: environment[used])
    kwargs = fx.map_arg(node.kwargs, lambda used: environment[used])
    new = graph.create_node("call_function", node.target, args, kwargs, name=node.name)  # type: ignore[arg-type]
    modules = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    # a module that is called again has "@1", "@2" after its path
    path = re.sub(r"@\d+", "", modules[-1]) if modules else ""
    new.meta = dict(origin_of(node.meta.get("stack_trace"), path))
    if "val" in node.meta:
        new.meta["val"] = node.meta["val"]
        if isinstance(node.meta["val"], Tensor) and free_unbacked_symbols(node.meta["val"]):
            raise size_of_values(line_of_stack(node.meta.get("stack_trace")))
    return new


def _inline(
    source: fx.GraphModule,
    body: Any,
    inputs: Sequence[Any],
    graph: fx.Graph,
    environment: dict[fx.Node, Any],
) -> list[Any]:
    """`with torch.no_grad()` blocks, and those of a disabled autocast, come as subgraphs."""
    inner = getattr(source, str(body.target))
    placeholders = inner.graph.find_nodes(op="placeholder")
    given = {place: environment[value] for place, value in zip(placeholders, inputs, strict=True)}
    return _copy(inner, graph, given)


def _detached(graph: fx.Graph, node: fx.Node) -> fx.Node:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return node
    detached = graph.call_function(torch.ops.aten.detach.default, (node,))
    detached.meta = dict(node.meta)
    return detached
