"""Capture: a user's model becomes the canonical graph that all schemes rewrite."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from qcompile.errors import CaptureError, InvalidInputType
from qcompile.passes.capture_export import trace_with_export
from qcompile.passes.capture_fx import trace_with_fx
from qcompile.passes.compare_modes import check_same_in_both_modes
from qcompile.passes.example_inputs import Examples, examples_of, required_parameters
from qcompile.passes.module_tree import module_at
from qcompile.passes.normalise import normalise_evaluation, normalise_training
from qcompile.passes.signature import CallSignature, Parameter, TensorInput, leaves_of
from qcompile.passes.trace import Trace


@dataclass(frozen=True)
class Captured:
    """A captured model.

    Attributes:
        graph_module: the canonical graph. It owns copies of the parameters, under the user's state_dict keys,
            and returns a flat tuple of tensors.
        signature: how a call of the user's model maps to the graph's inputs, and back.
        method: the tracer that was used.
    """

    graph_module: fx.GraphModule
    signature: CallSignature
    method: Literal["export", "fx"]


def capture(
    model: nn.Module, example_inputs: tuple[Any, ...] | list[Any] | dict[str, Any] | Tensor | None = None
) -> Captured:
    """Capture a model in training and evaluation mode as one canonical graph.

    Args:
        model: the user's float model; it is left untouched.
        example_inputs: a tuple (or list) of positional inputs, a dict of keyword inputs, or one tensor;
            tensors may be nested in tuples, lists and dicts. Dimension 0 of the first tensor is the batch,
            which stays dynamic; an example of batch 1 is repeated. Without examples the model is traced
            symbolically, which fewer models allow.

    Returns:
        The graph, its signature, and the tracer that was used.

    Raises:
        InvalidInputType: if the model is no nn.Module or the examples are no tuple, list, dict or tensor.
        InvalidArgument: if the examples do not fit the model's forward.
        CaptureError: if the model cannot be captured; the message names the user's line and what to do.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInputType(f"model must be a torch.nn.Module, got {type(model).__name__}")
    copied = _copied(model)
    examples = None if example_inputs is None else examples_of(copied, example_inputs)
    traces: dict[bool, Trace] = {}
    with _random_state_kept(model), _momentum_for_tracing(copied), _default_modes():
        for training in (False, True):
            traces[training] = _trace(copied.train(training), examples)
    graph_module = normalise_training(traces[True].graph_module, copied)
    evaluation = normalise_evaluation(traces[False].graph_module, copied, graph_module)
    check_same_in_both_modes(graph_module, evaluation)
    _set_modes(graph_module, model)
    return Captured(graph_module, _signature(copied, traces[True], examples), "export" if examples else "fx")


def _trace(model: nn.Module, examples: Examples | None) -> Trace:
    return trace_with_fx(model) if examples is None else trace_with_export(model, examples)


def _signature(model: nn.Module, trace: Trace, examples: Examples | None) -> CallSignature:
    placeholders = list(trace.graph_module.graph.find_nodes(op="placeholder"))
    if examples is None:
        names = required_parameters(model)
        spec = torch.utils._pytree.tree_structure(0)
        parameters = tuple(Parameter(name, spec, (index,)) for index, name in enumerate(names))
        inputs = tuple(TensorInput(node.name) for node in placeholders)
        positional = names
    else:
        parameters, positional = examples.parameters, examples.positional
        inputs = tuple(
            TensorInput(
                node.name,
                example.dtype,
                tuple(
                    None if isinstance(size, torch.SymInt) else int(size) for size in node.meta["val"].shape
                ),
            )
            for node, example in zip(placeholders, examples.tensors, strict=True)
        )
    outputs = [
        torch.empty(0) if isinstance(value, (fx.Node, fx.Proxy, Tensor)) else value
        for value in trace.out_values
    ]
    return CallSignature(inputs, parameters, positional, trace.out_spec, leaves_of(outputs, 0, "the output"))


def _set_modes(graph_module: fx.GraphModule, model: nn.Module) -> None:
    """Training flags as in the user's model, a layer that the user put in evaluation included."""
    graph_module.train(model.training)
    for path, module in graph_module.named_modules():
        users = module_at(model, path)
        if users is not None:
            module.training = users.training


def _copied(model: nn.Module) -> nn.Module:
    # the old torch.nn.utils.weight_norm leaves a computed weight as attribute, which deepcopy refuses
    memo = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as cause:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({str(cause).splitlines()[0]}); "
            "remove what copy.deepcopy rejects"
        ) from cause


@contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    """Tracing runs the user's code, which may draw random numbers; nothing of that may show afterwards."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[device.index for device in devices]):
            yield
    finally:
        random.setstate(state)


@contextmanager
def _default_modes() -> Iterator[None]:
    """Trace with gradients, in full precision, and without attention kernels that only evaluation uses."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _momentum_for_tracing(model: nn.Module) -> Iterator[None]:
    """Norms with momentum=None compute it from a counter, which cannot be traced; lend them a number."""
    cumulative = [
        module for module in model.modules() if isinstance(module, _NormBase) and module.momentum is None
    ]
    for module in cumulative:
        module.momentum = 0.1
    try:
        yield
    finally:
        for module in cumulative:
            module.momentum = None
