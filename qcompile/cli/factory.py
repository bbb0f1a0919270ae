"""Models that a function of the user's makes, and their weights."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import FileAccessError, FileFormatError, InvalidArgument


def width(text: str) -> int:
    """A bit-width of a list on the command line.

    Raises:
        InvalidArgument: if it is none.
    """
    if not text.strip().isdecimal():
        raise InvalidArgument(f"--bits {text!r} is no bit-width; write for example --bits 2,3,4")
    return int(text)


def build(factory: str) -> nn.Module:
    """What a function returns.

    Args:
        factory: module:function.

    Raises:
        InvalidArgument: if it cannot be imported or called, or returns no module.
    """
    module_name, separator, attribute = factory.partition(":")
    if not separator or not module_name or not attribute:
        raise InvalidArgument(
            f"{factory!r} must name a function as module:function, for example nets.small:build"
        )
    sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InvalidArgument(
            f"cannot import {module_name!r} from here: {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove("")
    function = getattr(module, attribute, None)
    if not callable(function):
        raise InvalidArgument(f"module {module_name!r} has no function {attribute!r}")
    try:
        model = function()
    except Exception as error:
        raise InvalidArgument(f"{factory} raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise InvalidArgument(f"{factory} returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def parameters_of(model: nn.Module) -> list[str]:
    """Names of the parameters of `forward` that take one value each."""
    single = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(model.forward).parameters.values()
    named = [one for one in parameters if one.kind in single]
    return [one.name for one in named if one.default is inspect.Parameter.empty] or ["x"]


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict.

    Raises:
        FileAccessError: if the file cannot be read.
        FileFormatError: if it is no safetensors file.
    """
    try:
        return load_file(path)
    except OSError as error:
        raise FileAccessError(f"{path}: cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise FileFormatError(f"{path}: no safetensors file ({error})") from error


def load_weights(model: nn.Module, path: Path, state: dict[str, Tensor]) -> None:
    """Load what `read_weights` read.

    Raises:
        FileFormatError: naming the file, if it does not fit.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise FileFormatError(
            f"{path}: does not fit the model: {' '.join(str(error).split())[:300]}"
        ) from error
