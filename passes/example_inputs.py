"""What the caller gave as example inputs, in the form that tracing and the call signature need."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qcompile.errors import CaptureError, InvalidArgument, InvalidInputType
from qcompile.passes.open_sizes import OpenSize, open_sizes
from qcompile.passes.signature import Parameter, leaves_of


@dataclass(frozen=True)
class CallInputs:
    """Positional and keyword inputs of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, example_inputs: Any) -> CallInputs:
        """What the caller gave as examples: a tensor, a tuple or list, a dict of keyword inputs, or a call.

        Raises:
            InvalidInputType: for anything else.
        """
        if isinstance(example_inputs, CallInputs):
            return example_inputs
        if isinstance(example_inputs, Tensor):
            return cls((example_inputs,), {})
        if isinstance(example_inputs, dict):
            return cls((), example_inputs)
        if isinstance(example_inputs, (tuple, list)):
            return cls(tuple(example_inputs), {})
        raise InvalidInputType(
            "example_inputs must be a tuple of positional inputs, a dict of keyword inputs, or one tensor, "
            f"got {type(example_inputs).__name__}"
        )


@dataclass(frozen=True)
class Examples:
    """Example inputs, at batch 2 or more.

    Attributes:
        args: positional inputs.
        kwargs: keyword inputs, in the order of the parameters of `forward`.
        batch: size of the batch; None if no input has a dimension.
        parameters: the parameters of `forward` that are given.
        positional: names of what `forward` takes by position, in order.
        repeated: indices of the tensors that were repeated to batch 2.
        single_sample: the inputs as they were given, if that was a batch of 1.
        open: for every tensor its open dimensions besides the batch.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: int | None
    parameters: tuple[Parameter, ...]
    positional: tuple[str, ...]
    repeated: frozenset[int] = frozenset()
    single_sample: CallInputs | None = None
    open: tuple[tuple[OpenSize, ...], ...] = ()

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the graph's placeholders."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def batched(self) -> list[int]:
        """Indices of the tensors whose dimension 0 may be the batch; the first is the one that surely is."""
        found = [
            (tensor.ndim < 2, index)  # a vector may be anything
            for index, tensor in enumerate(self.tensors)
            if tensor.ndim > 0 and tensor.shape[0] == self.batch
        ]
        return [index for _, index in sorted(found)]

    def unrepeated(self, indices: Collection[int]) -> Examples:
        """The same with some of the repeated tensors as they were given."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for index in indices:
            leaves[places[index]] = leaves[places[index]][:1].clone()
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return replace(self, args=args, kwargs=kwargs, repeated=self.repeated - set(indices))


def examples_of(model: nn.Module, example_inputs: Any, dynamic_shapes: Any = None) -> Examples:
    """Sort example inputs by the parameters of the model's `forward`.

    Args:
        model: the model.
        example_inputs: a tuple or list of positional inputs, a dict of keyword inputs, or one tensor.
        dynamic_shapes: open dimensions, see `open_sizes`.

    Raises:
        InvalidInputType: for anything else.
        InvalidArgument: if they do not fit `forward`, or hold an empty batch, or lack open dimensions.
        CaptureError: if a leaf is neither a tensor nor a plain constant.
    """
    given = CallInputs.of(example_inputs)
    args, kwargs = given.args, given.kwargs
    names, positional, kwargs = _names(model, args, kwargs)
    given = CallInputs(args, kwargs)
    args, kwargs, batch, repeated = _at_batch_of_two(args, kwargs)
    parameters: list[Parameter] = []
    count = 0
    by_name = dict(zip(names, (*args, *kwargs.values()), strict=True))
    opened = open_sizes({} if dynamic_shapes is None else dynamic_shapes, by_name)
    of_tensors: list[tuple[OpenSize, ...]] = []
    for name, value in by_name.items():
        leaves, spec = pytree.tree_flatten(value)
        numbered = leaves_of(leaves, count, f"input '{name}'")
        count += sum(isinstance(leaf, int) for leaf in numbered)
        parameters.append(Parameter(name, spec, numbered))
        of_tensors += [opened.get(name, ())] * (count - len(of_tensors))
    if count == 0:
        raise InvalidArgument("example_inputs hold no tensor; pass at least one")
    single = given if repeated else None
    return Examples(args, kwargs, batch, tuple(parameters), positional, repeated, single, tuple(of_tensors))


def required_parameters(model: nn.Module) -> tuple[str, ...]:
    """Parameters of `forward` without a default: the inputs of a model that is captured without examples.

    Raises:
        CaptureError: if `forward` takes any number of inputs.
    """
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            raise CaptureError(
                f"forward of {type(model).__name__} takes *{parameter.name}; pass example_inputs"
            )
        if (
            parameter.kind is not inspect.Parameter.VAR_KEYWORD
            and parameter.default is inspect.Parameter.empty
        ):
            names.append(parameter.name)
    return tuple(names)


def _names(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[str], tuple[str, ...], dict[str, Any]]:
    """Names of all given inputs in call order and of all positional parameters, and the keyword inputs."""
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InvalidArgument(
            f"example_inputs do not fit forward of {type(model).__name__}: {error}"
        ) from error
    kinds = inspect.Parameter
    positional: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD):
            positional.append(parameter.name)
        elif parameter.kind is kinds.VAR_POSITIONAL:
            positional += [f"{parameter.name}[{i}]" for i in range(len(args) - len(positional))]
    declared = [name for name in signature.parameters if name in kwargs]
    ordered = {name: kwargs[name] for name in (*declared, *(name for name in kwargs if name not in declared))}
    return [*positional[: len(args)], *ordered], tuple(positional), ordered


def _at_batch_of_two(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], int | None, frozenset[int]]:
    """Fresh copies of all tensors; export cannot keep a batch of 1 dynamic, so that one is repeated."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    batched = [tensor for tensor in tensors if tensor.ndim > 0]
    batched.sort(key=lambda tensor: tensor.ndim < 2)  # a vector may be anything, so it decides last
    batch = batched[0].shape[0] if batched else None
    if batch == 0:
        raise InvalidArgument("example_inputs hold an empty batch; pass at least one sample")
    repeated = [batch == 1 and tensor.ndim > 0 and tensor.shape[0] == 1 for tensor in tensors]
    fresh = iter(
        torch.cat([tensor.detach()] * 2) if again else tensor.detach().clone()
        for tensor, again in zip(tensors, repeated, strict=True)
    )
    leaves = [next(fresh) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    indices = frozenset(index for index, again in enumerate(repeated) if again)
    return args, kwargs, 2 if batch == 1 else batch, indices
