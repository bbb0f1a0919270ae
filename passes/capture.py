"""Capture: a user's model becomes the canonical graph that all schemes rewrite."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from qcompile.errors import CaptureError, InvalidArgument, InvalidInputType
from qcompile.passes.capture_export import trace_settled, trace_with_export
from qcompile.passes.capture_fx import trace_with_fx
from qcompile.passes.compare_modes import check_same_in_both_modes
from qcompile.passes.example_inputs import CallInputs, Examples, examples_of, required_parameters
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
        only_evaluation: why the graph is that of evaluation mode only; None if it serves both.
    """

    graph_module: fx.GraphModule
    signature: CallSignature
    method: Literal["export", "fx"]
    only_evaluation: str | None = None


def capture(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | list[Any] | dict[str, Any] | CallInputs | Tensor | None = None,
    dynamic_shapes: Any = None,
) -> Captured:
    """Capture a model in training and evaluation mode as one canonical graph.

    Args:
        model: the user's float model; it is left untouched.
        example_inputs: a tuple (or list) of positional inputs, a dict of keyword inputs, or one tensor;
            tensors may be nested in tuples, lists and dicts. Dimension 0 of the first tensor is the batch,
            which stays dynamic, as in others of its size; an example of batch 1 is repeated. Without examples
            the model is traced symbolically, which fewer models allow.
        dynamic_shapes: other dimensions to leave open, by input, see `open_sizes`.

    Returns:
        The graph, its signature, and the tracer that was used. A model that is passed in evaluation mode and
        whose training mode cannot be captured, or does more than evaluation besides dropout, stochastic depth
        and batch normalisation, gives the graph of evaluation mode, with a warning.

    Raises:
        InvalidInputType: if the model is no nn.Module or the examples are no tuple, list, dict or tensor.
        InvalidArgument: if the examples do not fit the model's forward.
        CaptureError: if the model cannot be captured; the message names the user's line and what to do.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInputType(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if dynamic_shapes is not None and example_inputs is None:
        raise InvalidArgument("dynamic_shapes needs example_inputs: without them every size is open")
    copied = copied_model(model)
    examples = None if example_inputs is None else examples_of(copied, example_inputs, dynamic_shapes)
    only_evaluation = None
    try:
        graph_module, trace = _of_both_modes(model, copied, examples)
    except CaptureError as difference:
        try:
            (trace,) = _traces(model, copied, examples, (False,))
            graph_module = normalise_evaluation(trace.graph_module, copied)
        except CaptureError:
            if model.training:
                raise difference from None
            raise
        if model.training:
            raise CaptureError(
                f"{difference}; or pass the model after model.eval(): it then trains as it evaluates",
                difference.place,
            ) from difference
        only_evaluation = str(difference).partition("; ")[0]
        warnings.warn(
            f"training mode of {type(model).__name__} cannot be captured ({only_evaluation}); the model "
            "was passed in evaluation mode, so the prepared one trains as it evaluates",
            stacklevel=3,
        )
    _set_modes(graph_module, model)
    method: Literal["export", "fx"] = "export" if examples else "fx"
    return Captured(graph_module, _signature(copied, trace, examples), method, only_evaluation)


def _of_both_modes(
    model: nn.Module, copied: nn.Module, examples: Examples | None
) -> tuple[fx.GraphModule, Trace]:
    """The canonical graph that training and evaluation share, and the trace of training."""
    evaluation, training = _traces(model, copied, examples, (False, True))
    graph_module = normalise_training(training.graph_module, copied)
    check_same_in_both_modes(
        graph_module, normalise_evaluation(evaluation.graph_module, copied, graph_module)
    )
    return graph_module, training


def _traces(
    model: nn.Module, copied: nn.Module, examples: Examples | None, training: tuple[bool, ...]
) -> list[Trace]:
    with random_state_kept(model), _nothing_drawn(model), _momentum_for_tracing(copied), _default_modes():
        if examples is None:
            return [trace_with_fx(copied.train(mode)) for mode in training]
        first, settled = trace_settled(copied.train(training[0]), examples)
        return [first, *(trace_with_export(copied.train(mode), settled) for mode in training[1:])]


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
                opened,
            )
            for node, example, opened in zip(placeholders, examples.tensors, examples.open, strict=True)
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


def copied_model(model: nn.Module, replacements: Mapping[nn.Module, nn.Module] | None = None) -> nn.Module:
    """A deep copy, with other modules in place of some.

    Raises:
        CaptureError: if it cannot be copied.
    """
    # the old torch.nn.utils.weight_norm leaves a computed weight as attribute, which deepcopy refuses
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    memo |= {id(old): new for old, new in (replacements or {}).items()}
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as cause:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({str(cause).splitlines()[0]}); "
            "remove what copy.deepcopy rejects"
        ) from cause


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Run a block that leaves random states as they are.

    Tracing runs the user's code, which may draw random numbers; nothing of that may show afterwards."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[device.index for device in devices]):
            yield
    finally:
        random.setstate(state)


@contextmanager
def _nothing_drawn(model: nn.Module) -> Iterator[None]:
    """Refuse a forward that draws from generators whose numbers a graph would keep for good.

    Raises:
        CaptureError: if it does.
    """
    states, numpys = random.getstate(), np.random.get_state(legacy=False)
    try:
        yield
        drawn = random.getstate() != states or repr(np.random.get_state(legacy=False)) != repr(numpys)
    finally:
        np.random.set_state(numpys)
    if drawn:
        raise CaptureError(
            f"forward of {type(model).__name__} draws from Python's or numpy's random, and a graph would "
            "keep what it drew; draw with torch.rand and choose with torch.where"
        )


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
