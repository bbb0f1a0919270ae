"""One torch operator that stands for any kernel, so that a graph of kernels is an ordinary torch graph.

torch.export carries it through, and the importer into Relax asks the operator's key which kernel to put
there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .costs import Choice


class InPlace(NamedTuple):
    """See `Kernel.in_place`."""

    source: int
    target: int
    build: Callable[[str], Any]


@dataclass(frozen=True)
class Kernel:
    """A kernel that is not built yet.

    Attributes:
        name: symbol, unique in its module.
        layer: module path that it computes.
        summary: what it is, for people.
        outputs: (shape, dtype) of every output.
        build: makes the PrimFunc of that name.
        choice: of families, for layers.
        in_place: an input and an output, as positions among all arguments, that may be one tensor, and what
            makes the PrimFunc for that: then it does not touch the output's buffer.
    """

    name: str
    layer: str
    summary: str
    outputs: tuple[tuple[tuple[int, ...], str], ...]
    build: Callable[[str], Any]
    choice: Choice | None = None
    in_place: InPlace | None = None


_kernels: dict[str, Kernel] = {}
_keys = itertools.count()


def register(kernel: Kernel) -> str:
    """Make a kernel known; returns its key."""
    key = f"{next(_keys)}"
    _kernels[key] = kernel
    return key


def find(key: str) -> Kernel:
    """The kernel of a key."""
    return _kernels[key]


def forget(keys: list[str]) -> None:
    """Drop kernels that were imported."""
    for key in keys:
        _kernels.pop(key, None)


@torch.library.custom_op("qcompile_tvm::kernel", mutates_args=())
def kernel(inputs: list[Tensor], key: str) -> list[Tensor]:
    """Outputs of the kernel `key`; it exists compiled only."""
    raise NotImplementedError("kernels run where they were compiled for, not in torch")


@kernel.register_fake
def _(inputs: list[Tensor], key: str) -> list[Tensor]:
    return [torch.empty(shape, dtype=getattr(torch, dtype)) for shape, dtype in find(key).outputs]
