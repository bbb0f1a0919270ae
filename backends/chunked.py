"""Batches of any size on an executable of one size: split, fill the last part up, join the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from qcompile.errors import InvalidArgument
from qcompile.passes.calls import batch_of, call_arguments, some_samples

from .target import Executable, Trace


class ChunkedExecutable(Executable):
    """An executable that takes any batch.

    Args:
        inner: compiled for one batch size; everything but calls is its own.
    """

    def __init__(self, inner: Executable) -> None:
        self.inner, self.target, self.request = inner, inner.target, inner.request
        self.reproducible, self.is_native = inner.reproducible, inner.is_native

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run part by part; outputs are joined along dimension 0. Inputs without a batch go to every part.

        Raises:
            InvalidArgument: if the inputs' batches differ, or other dimensions are not the compiled ones.
        """
        signature, batch = self.request.signature, self.request.batch
        tensors = signature.bind(args, kwargs)
        if not any(one.is_batched for one in signature.inputs):
            return self.inner(*args, **kwargs)
        size = batch_of(signature, [one.shape for one in tensors])
        if not size:
            given = zip(tensors, signature.inputs, strict=True)
            sizes = {len(x) if x.dim() else 0 for x, one in given if one.is_batched}
            found = ", ".join(map(str, sorted(sizes)))
            raise InvalidArgument(f"inputs need one batch size along dimension 0, they have {found}")
        parts = [self._part(tensors, start, batch) for start in range(0, size, batch)]
        self._check(parts[0])
        leaves = [pytree.tree_flatten(part) for part in parts]
        joined = [
            torch.cat(column)[:size] if isinstance(column[0], Tensor) else column[0]
            for column in zip(*(flat for flat, _ in leaves), strict=True)
        ]
        return pytree.tree_unflatten(joined, leaves[0][1])

    def _check(self, part: Any) -> None:
        for index, one in enumerate(pytree.tree_leaves(part)):
            if isinstance(one, Tensor) and (one.dim() == 0 or len(one) != self.request.batch):
                raise InvalidArgument(
                    f"output {index} of shape {tuple(one.shape)} has no batch along dimension 0: its chunks "
                    "cannot be joined; lower for the whole batch, without chunk=True"
                )

    def _part(self, tensors: Sequence[Tensor], start: int, batch: int) -> Any:
        signature = self.request.signature

        def filled(part: Tensor) -> Tensor:
            missing = batch - len(part)
            return torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part

        taken = some_samples(signature, tensors, start, start + batch)
        flat = [filled(x) if one.is_batched else x for x, one in zip(taken, signature.inputs, strict=True)]
        given, named = call_arguments(signature, flat)
        return self.inner(*given, **named)

    def export(self, folder: str | Path) -> tuple[Path, ...]:
        """What the inner executable writes: a device sees the compiled batch size."""
        return self.inner.export(folder)

    def trace(self, inputs: Sequence[NDArray[Any]]) -> Trace:
        """The inner executable's."""
        return self.inner.trace(inputs)

    def rounding_error(self, node: str, magnitude: Any) -> Any:
        """The inner executable's."""
        return self.inner.rounding_error(node, magnitude)

    def constants(self) -> Mapping[str, NDArray[Any]]:
        """The inner executable's."""
        return self.inner.constants()

    def kernels(self) -> list[dict[str, str]]:
        """The inner executable's."""
        return self.inner.kernels()

    def arena_bytes(self) -> int | None:
        """The inner executable's."""
        return self.inner.arena_bytes()
