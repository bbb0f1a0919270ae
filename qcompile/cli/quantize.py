"""`qcompile quantize`."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..calibrate import calibrate
from ..errors import FileAccessError, FileFormatError, InvalidArgument
from ..file.save import save
from ..prepare import prepare
from .data import read_inputs


def quantize_command(
    factory: str,
    weights: Path | None,
    scheme: str,
    bits: str | None,
    modes: str | None,
    skip: list[str],
    data: Path,
    batch: int,
    output: Path,
) -> None:
    """Build the float model, prepare and calibrate it, and write the file."""
    if batch < 1:
        raise InvalidArgument(f"--batch must be at least 1, not {batch}")
    model = _build(factory)
    inputs = read_inputs(data, _parameters(model))
    if weights is not None:
        _load_weights(model, weights)
    widths = None if bits is None else [_width(one) for one in bits.split(",")]
    names = None if modes is None else modes.split(",")
    prepared = prepare(model.eval(), inputs.part(0, 2), scheme=scheme, bits=widths, modes=names, skip=skip)
    starts = range(0, len(inputs), batch)
    calibrate(prepared, (inputs.part(start, start + batch) for start in starts), progress=True)
    save(prepared.eval(), output)
    print(f"wrote {output}")


def _width(text: str) -> int:
    if not text.strip().isdecimal():
        raise InvalidArgument(f"--bits {text!r} is no bit-width; write for example --bits 2,3,4")
    return int(text)


def _build(factory: str) -> nn.Module:
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


def _parameters(model: nn.Module) -> list[str]:
    """Names of the parameters of `forward` that take one value each."""
    single = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(model.forward).parameters.values()
    named = [one for one in parameters if one.kind in single]
    return [one.name for one in named if one.default is inspect.Parameter.empty] or ["x"]


def _load_weights(model: nn.Module, path: Path) -> None:
    try:
        state = load_file(path)
    except OSError as error:
        raise FileAccessError(f"{path}: cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise FileFormatError(f"{path}: no safetensors file ({error})") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise FileFormatError(
            f"{path}: does not fit the model: {' '.join(str(error).split())[:300]}"
        ) from error
