"""Which submodules could be prepared by themselves when a line of the model cannot be captured."""

from __future__ import annotations

from types import FunctionType

from torch import nn

from .passes.first_last import WEIGHTED

_LISTED = 6


def capturable_parts(model: nn.Module, file: str, number: int) -> list[str]:
    """Paths of the largest modules with weighted layers that do not run a line of the user's code.

    Args:
        model: the float model.
        file: of the line.
        number: of the line.

    Returns:
        Nothing, if the line is in no method of a module of the model: any of them could run it.
    """
    paths = {path for path, module in model.named_modules() if _runs(module, file, number)}
    if not paths:
        return []
    above = {
        path[:end] for path in paths for end in range(len(path) + 1) if path[end:].startswith(".") or not end
    }
    found: list[str] = []
    pending = [""]
    while pending:
        path = pending.pop()
        module = model.get_submodule(path)
        if path in above or path in paths or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            names = [f"{path}.{name}" if path else name for name, _ in module.named_children()]
            pending += reversed(names)
        elif any(isinstance(one, WEIGHTED) for one in module.modules()):
            found.append(path)
    # a layer that stands alone at either end is most likely the first or the last, which stay in float
    alone = [isinstance(model.get_submodule(path), WEIGHTED) for path in found]
    ends = {index for index in (0, len(found) - 1) if found and alone[index]}
    inner = [path for index, path in enumerate(found) if index not in ends]
    return inner or found


def advice(model: nn.Module, file: str, number: int) -> str:
    """What to append to an error, "" if nothing is known."""
    found = capturable_parts(model, file, number)
    if not found:
        return ""
    more = ", ..." if len(found) > _LISTED else ""
    return f"; or quantise the rest alone: submodules=[{', '.join(map(repr, found[:_LISTED]))}{more}]"


def _runs(module: nn.Module, file: str, number: int) -> bool:
    """Whether a method of the module's class holds the line."""
    for kind in type(module).__mro__:
        for function in vars(kind).values():
            code = function.__code__ if isinstance(function, FunctionType) else None
            if code is not None and code.co_filename == file:
                lines = [line for _, _, line in code.co_lines() if line is not None]
                if min(lines) <= number <= max(lines):
                    return True
    return False
