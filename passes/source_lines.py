"""Which line of the user's code made a node or raised an error."""

from __future__ import annotations

import os
import re
import sysconfig
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
from torch import fx

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)[^\n]*(?:\n\s+(?P<code>[^\n]+))?')
_TORCH = str(Path(torch.__file__).parent) + os.sep
_OURS = str(Path(__file__).parent) + os.sep
_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"] + os.sep
_LONGEST_CODE = 80
UNKNOWN_LINE = "unknown line"


class UserLine(NamedTuple):
    """A line of the user's code; the code itself may be unknown."""

    file: str
    number: int
    code: str = ""

    def __str__(self) -> str:
        code = f" ({self.code[:_LONGEST_CODE]})" if self.code else ""
        return f"{Path(self.file).name}:{self.number}{code}"


def _is_users(file: str) -> bool:
    if file.startswith((_TORCH, _OURS, "<")):
        return False
    return not (file.startswith(_STANDARD_LIBRARY) and "site-packages" not in file)


def line_of_stack(stack_trace: str | None) -> UserLine | None:
    """Innermost line outside torch of a formatted stack; None if there is none."""
    found = [frame for frame in _FRAME.finditer(stack_trace or "") if _is_users(frame["file"])]
    return UserLine(found[-1]["file"], int(found[-1]["line"])) if found else None


def origin_of(stack_trace: str | None, module_path: str) -> dict[str, str]:
    """What a node remembers: its "module_path", and its "source" where a line outside torch is known."""
    line = line_of_stack(stack_trace)
    return {"module_path": module_path} | ({"source": str(line)} if line else {})


def line_of_error(error: BaseException) -> UserLine | None:
    """Innermost line outside torch that an exception passed through, with its code; or None.

    The chain of causes is searched as well, because torch re-raises errors of the traced code.
    """
    current: BaseException | None = error
    while current is not None:
        frames = [f for f in traceback.extract_tb(current.__traceback__) if _is_users(f.filename)]
        if frames:
            return UserLine(frames[-1].filename, frames[-1].lineno or 0, frames[-1].line or "")
        current = current.__cause__ or current.__context__
    return None


def source_of(node: fx.Node) -> str:
    """Where a node comes from: "file.py:12" of the user's code, else its layer, else "unknown line"."""
    path = node.meta.get("module_path")
    return node.meta.get("source") or (f"layer '{path}'" if path else UNKNOWN_LINE)
