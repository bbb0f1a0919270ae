"""Calls of a model on other tensors, and on some of their samples.

Dimension 0 of an input is the batch where the capture left it open (`TensorInput.is_batched`). Positions,
tables and masks that all samples share have a fixed size there, and go into every call whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from qcompile.passes.signature import CallSignature, Constant

Shapes = tuple[tuple[int, ...], ...]


def call_arguments(
    signature: CallSignature, flat: Sequence[Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The user's call with other tensors: positional and keyword arguments."""
    values = {
        parameter.name: pytree.tree_unflatten(
            [leaf.value if isinstance(leaf, Constant) else flat[leaf] for leaf in parameter.leaves],
            parameter.spec,
        )
        for parameter in signature.parameters
    }
    args = []
    for name in signature.positional:
        if name not in values:
            break  # what follows goes by keyword
        args.append(values.pop(name))
    return tuple(args), values


def sample_shapes(signature: CallSignature, shapes: Sequence[Sequence[int]]) -> Shapes:
    """Shapes of the flat inputs without the batch."""
    return tuple(
        tuple(shape[1:] if one.is_batched else shape)
        for one, shape in zip(signature.inputs, shapes, strict=True)
    )


def batched_shapes(signature: CallSignature, samples: Sequence[Sequence[int]], batch: int) -> Shapes:
    """Shapes of the flat inputs at a batch size, from those without."""
    return tuple(
        (batch, *shape) if one.is_batched else tuple(shape)
        for one, shape in zip(signature.inputs, samples, strict=True)
    )


def at_batch(signature: CallSignature, shapes: Sequence[Sequence[int]], batch: int) -> Shapes:
    """Shapes of the flat inputs at another batch size."""
    return tuple(
        (batch, *shape[1:]) if one.is_batched and len(shape) else tuple(shape)
        for one, shape in zip(signature.inputs, shapes, strict=True)
    )


def batch_of(signature: CallSignature, shapes: Sequence[Sequence[int]]) -> int | None:
    """The batch of inputs of these shapes; None if there is none, or they have several."""
    sizes = {
        shape[0] if len(shape) else None
        for one, shape in zip(signature.inputs, shapes, strict=True)
        if one.is_batched
    }
    return sizes.pop() if len(sizes) == 1 else None


def some_samples(signature: CallSignature, flat: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """The flat inputs of samples `start` to `stop`."""
    return [
        value[start:stop] if one.is_batched else value
        for one, value in zip(signature.inputs, flat, strict=True)
    ]
