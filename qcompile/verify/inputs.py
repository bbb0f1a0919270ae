"""The user's inputs: as flat tensors, and in pieces of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidArgument
from ..passes.calls import some_samples
from ..passes.signature import CallSignature

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


def piece_samples(inputs: Sequence[Tensor], samples: int) -> int:
    """How many samples of a batch are checked at a time to keep memory bounded."""
    per_sample = sum(value.numel() for value in inputs) // samples
    return max(1, min(samples, PIECE_SAMPLES, PIECE_ELEMENTS // max(1, per_sample)))


def pieces(
    signature: CallSignature, inputs: Sequence[Tensor], samples: int | None, size: int | None
) -> Iterator[tuple[int, list[Tensor]]]:
    """(index of the first sample, inputs) for every piece of `size` samples; one piece if None."""
    if samples is None or size is None:
        yield 0, list(inputs)
        return
    for start in range(0, samples, size):
        yield start, some_samples(signature, inputs, start, start + size)
