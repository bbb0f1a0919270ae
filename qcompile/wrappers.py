"""The prepared model inside of what training scripts wrap around it."""

from __future__ import annotations

from torch import nn

from .errors import InvalidInputType
from .multi_mode import MultiModeModel
from .partly_prepared import refuse_parts
from .prepared import Prepared

#: Where wrappers keep what they wrap: torch.compile, checkpointing, data parallel and what is built like it.
_INNER = ("_orig_mod", "_checkpoint_wrapped_module", "module")


def layers_of_wrapping(model: nn.Module) -> list[nn.Module]:
    """The module and what it wraps, outermost first."""
    found = [model]
    while not isinstance(found[-1], MultiModeModel):
        inner = [one for name in _INNER if isinstance(one := found[-1]._modules.get(name), nn.Module)]
        if not inner:
            break
        found.append(inner[0])
    return found


def as_multi_mode(model: nn.Module) -> MultiModeModel:
    """The model that was prepared or loaded by qcompile, out of its wrappers.

    Raises:
        InvalidInputType: if there is none.
    """
    inner = layers_of_wrapping(model)[-1] if isinstance(model, nn.Module) else model
    if not isinstance(inner, MultiModeModel):
        raise InvalidInputType(
            f"expected a model from qcompile.prepare or qcompile.load, not {type(inner).__name__}"
        )
    return inner


def as_one_graph(model: nn.Module) -> MultiModeModel:
    """The same, of a model that is one graph.

    Raises:
        InvalidInputType: if there is none.
        InvalidArgument: if it was prepared in parts; names them.
    """
    inner = as_multi_mode(model)
    refuse_parts(inner)
    return inner


def as_prepared(model: nn.Module) -> Prepared:
    """The model that can be trained, that is, comes from `prepare`, out of its wrappers.

    Raises:
        InvalidInputType: if there is none.
    """
    inner = as_multi_mode(model)
    if not isinstance(inner, Prepared):
        raise InvalidInputType(
            "a model loaded from a file runs but does not train: prepare the float model instead"
        )
    return inner
