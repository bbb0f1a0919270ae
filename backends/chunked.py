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
        """Run part by part; outputs are joined along dimension 0.

        Raises:
            InvalidArgument: if the inputs' batches differ, or other dimensions are not the compiled ones.
        """
        tensors = self.request.signature.bind(args, kwargs)
        sizes = {len(one) if one.dim() else 0 for one in tensors}
        if len(sizes) != 1 or 0 in sizes:
            found = ", ".join(map(str, sorted(sizes)))
            raise InvalidArgument(f"inputs need one batch size along dimension 0, they have {found}")
        size, batch = sizes.pop(), self.request.batch
        parts = [self._part(args, kwargs, start, batch) for start in range(0, size, batch)]
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

    def _part(self, args: Any, kwargs: Any, start: int, batch: int) -> Any:
        def take(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            part = value[start : start + batch]
            missing = batch - len(part)
            return torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part

        given, named = pytree.tree_map(take, (args, kwargs))
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
