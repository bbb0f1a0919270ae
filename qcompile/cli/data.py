"""Arrays from .npz files, without pickle."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import FileAccessError, FileFormatError
from ..passes.signature import CallSignature


def read_arrays(path: Path) -> dict[str, Tensor]:
    """Every array of an .npz file as a tensor, in file order; float64 becomes float32.

    Raises:
        FileAccessError: if the file cannot be read.
        FileFormatError: if it is no .npz file of plain numeric arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise FileFormatError(f"{path}: expected an .npz file with an array `x`")
            arrays = {name: archive[name] for name in archive.files}
    except OSError as error:
        raise FileAccessError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        raise FileFormatError(f"{path}: no .npz file of plain numeric arrays ({error})") from error
    if not arrays:
        raise FileFormatError(f"{path}: holds no arrays")
    tensors = {}
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise FileFormatError(f"{path}: array {name!r} has dtype {array.dtype}, expected numbers")
        tensor = torch.from_numpy(np.require(array, requirements="C"))
        tensors[name] = tensor.float() if tensor.dtype == torch.float64 else tensor
    return tensors


@dataclass(frozen=True)
class Inputs:
    """A model's inputs.

    Attributes:
        values: by the parameter of `forward` that takes them; dimension 0 is the sample.
        shared: parameters whose tensors are no samples: positions, tables, masks.
    """

    values: dict[str, Tensor]
    shared: frozenset[str]

    def __len__(self) -> int:
        """How many samples."""
        return next((len(value) for name, value in self.values.items() if name not in self.shared), 1)

    def part(self, start: int, stop: int) -> dict[str, Tensor]:
        """Some of the samples."""
        return {
            name: value if name in self.shared else value[start:stop] for name, value in self.values.items()
        }


def shared_parameters(signature: CallSignature) -> frozenset[str]:
    """Parameters whose tensors have no batch."""
    return frozenset(
        one.name
        for one in signature.parameters
        if not any(signature.inputs[leaf].is_batched for leaf in one.leaves if isinstance(leaf, int))
    )


def read_inputs(path: Path, parameters: Sequence[str], shared: Collection[str] | None = None) -> Inputs:
    """The model's inputs by the parameter of `forward` that takes them.

    Arrays may be called like the parameters. A single input may also be called `x`, or be the first array.

    Args:
        path: of an .npz file.
        parameters: the model's.
        shared: those whose tensors have no batch; None if that is not known: those of another size than the
            first then.

    Raises:
        FileFormatError: if an input is missing, holds no samples, or they differ in number.
    """
    return _inputs(path, read_arrays(path), parameters, shared)


def _inputs(
    path: Path, arrays: dict[str, Tensor], parameters: Sequence[str], shared: Collection[str] | None
) -> Inputs:
    values = {name: arrays[name] for name in parameters if name in arrays}
    if not values:
        if len(parameters) > 1:
            raise FileFormatError(f"{path}: needs arrays {', '.join(parameters)}, has {', '.join(arrays)}")
        values = {name: arrays.get("x", next(iter(arrays.values()))) for name in parameters}
    if shared is None:
        first = next(iter(values.values()))
        shared = [name for name, value in values.items() if value.shape[:1] != first.shape[:1]]
    batched = {name: value for name, value in values.items() if name not in shared}
    for name, value in batched.items():
        if value.dim() < 1 or not len(value):
            raise FileFormatError(
                f"{path}: input {name!r} has shape {tuple(value.shape)}, expected (samples, ...)"
            )
    if len({len(value) for value in batched.values()}) > 1:
        raise FileFormatError(f"{path}: its inputs differ in the number of samples")
    return Inputs(values, frozenset(shared))


def read_labelled(path: Path, parameters: Sequence[str], shared: Collection[str]) -> tuple[Inputs, Tensor]:
    """Inputs as `read_inputs` finds them, and whole-numbered labels `y`, one per sample.

    Raises:
        FileFormatError: if either is missing or they do not fit.
    """
    arrays = read_arrays(path)
    labels = arrays.pop("y", None)
    if labels is None or not arrays:
        held = ", ".join([*arrays, *(["y"] if labels is not None else [])])
        raise FileFormatError(f"{path}: needs inputs and labels, arrays x and y for example; has {held}")
    if labels.is_floating_point() or labels.dim() != 1 or not len(labels):
        raise FileFormatError(
            f"{path}: labels y have shape {tuple(labels.shape)} and dtype {labels.dtype}; expected one whole "
            "number per sample"
        )
    inputs = _inputs(path, arrays, parameters, shared)
    if len(labels) != len(inputs):
        raise FileFormatError(f"{path}: holds {len(inputs)} samples and {len(labels)} labels")
    return inputs, labels.long()
