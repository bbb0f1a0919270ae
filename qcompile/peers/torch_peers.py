"""torch on the CPU: eager, compiled, in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn


def eager(model: nn.Module, inputs: Sequence[Tensor], threads: int) -> Callable[[], object]:
    """As trained, channels last, in which torch's convolutions are fastest."""
    return _called(model, inputs, threads)


def compiled(model: nn.Module, inputs: Sequence[Tensor], threads: int) -> Callable[[], object]:
    """By `torch.compile`, weights frozen."""
    from torch._inductor import config

    torch.set_num_threads(threads)
    with config.patch(freezing=True), torch.inference_mode():
        called = torch.compile(_last(model))
        called(*map(_last_input, inputs))  # compiles, while the setting holds
    return _called(called, inputs, threads)


def bfloat16(model: nn.Module, inputs: Sequence[Tensor], threads: int) -> Callable[[], object]:
    """All weights and activations in bfloat16."""
    halves = [one.bfloat16() if one.is_floating_point() else one for one in inputs]
    return _called(model.bfloat16(), halves, threads)


def _called(model: Callable[..., object], inputs: Sequence[Tensor], threads: int) -> Callable[[], object]:
    if isinstance(model, nn.Module):
        model = _last(model)
    given = [_last_input(one) for one in inputs]

    def run() -> object:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        with torch.inference_mode():
            return model(*given)

    return run


def _last(model: nn.Module) -> nn.Module:
    move: Any = model.to  # its stub lacks the keyword
    return cast("nn.Module", move(memory_format=torch.channels_last))


def _last_input(one: Tensor) -> Tensor:
    return one.contiguous(memory_format=torch.channels_last) if one.dim() == 4 else one
