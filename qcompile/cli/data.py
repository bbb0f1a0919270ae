"""Arrays from .npz files, without pickle."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import FileAccessError, FileFormatError


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
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        tensors[name] = tensor.float() if tensor.dtype == torch.float64 else tensor
    return tensors


def read_inputs(path: Path) -> Tensor:
    """The inputs: array `x`, or the first one; dimension 0 is the sample."""
    arrays = read_arrays(path)
    inputs = arrays.get("x", next(iter(arrays.values())))
    if inputs.dim() < 2 or not len(inputs):
        raise FileFormatError(f"{path}: inputs have shape {tuple(inputs.shape)}, expected (samples, ...)")
    return inputs


def read_labelled(path: Path) -> tuple[Tensor, Tensor]:
    """Inputs `x` and integer labels `y` of equal length.

    Raises:
        FileFormatError: if either is missing or they do not fit.
    """
    arrays = read_arrays(path)
    if "x" not in arrays or "y" not in arrays:
        raise FileFormatError(f"{path}: needs arrays x and y, has {', '.join(arrays)}")
    x, y = arrays["x"], arrays["y"]
    if y.dim() != 1 or len(x) != len(y) or not len(y):
        raise FileFormatError(
            f"{path}: x has shape {tuple(x.shape)} and y {tuple(y.shape)}; one label per sample"
        )
    return x, y.long()
