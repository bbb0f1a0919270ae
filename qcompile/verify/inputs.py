"""The user's inputs: as flat tensors, in pieces of bounded size, and back as a call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import InvalidArgument
from ..passes.signature import CallSignature, Constant

#: Samples that are checked at a time, at most.
PIECE_SAMPLES = 32

#: Input elements that are checked at a time; tensors inside a network are a few hundred times as large.
PIECE_ELEMENTS = 1 << 19


def flat_inputs(signature: CallSignature, x: Any, floats: torch.dtype | None = None) -> list[Tensor]:
    """The graph's inputs from what the user passed.

    Args:
        signature: the model's.
        x: a tensor, a tuple or list of positional inputs, or a dict of keyword inputs.
        floats: a dtype that floating inputs may have besides float32, which they become.

    Raises:
        InvalidArgument: if the inputs do not fit the model, hold no sample, or NaN or infinity.
        InvalidInputType: if a leaf is no tensor or has another dtype.
    """
    if isinstance(x, dict):
        flat = signature.bind((), x, floats)
    else:
        flat = signature.bind(tuple(x) if isinstance(x, (tuple, list)) else (x,), None, floats)
    for one, value in zip(signature.inputs, flat, strict=True):
        if value.numel() == 0:
            raise InvalidArgument(f"input {one.name!r} of shape {tuple(value.shape)} holds no sample")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InvalidArgument(f"input {one.name!r} holds NaN or infinity, which no code stands for")
    return [value.detach().float() if value.is_floating_point() else value.detach() for value in flat]


def sample_count(inputs: Sequence[Tensor]) -> int | None:
    """Size of the batch, or None if the inputs do not share dimension 0 and so cannot be split."""
    sizes = {value.shape[0] if value.dim() else None for value in inputs}
    return sizes.pop() if len(sizes) == 1 else None


def piece_samples(inputs: Sequence[Tensor]) -> int:
    """How many samples of a batch are checked at a time to keep memory bounded."""
    samples = sample_count(inputs)
    assert samples is not None
    per_sample = sum(value.numel() for value in inputs) // samples
    return max(1, min(samples, PIECE_SAMPLES, PIECE_ELEMENTS // max(1, per_sample)))


def pieces(inputs: Sequence[Tensor], size: int | None) -> Iterator[tuple[int, list[Tensor]]]:
    """(index of the first sample, inputs) for every piece of `size` samples; one piece if None."""
    if size is None:
        yield 0, list(inputs)
        return
    for start in range(0, len(inputs[0]), size):
        yield start, [value[start : start + size] for value in inputs]


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
