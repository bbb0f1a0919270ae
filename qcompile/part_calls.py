"""How a model that was prepared in parts tells them what to run.

Between the whole and its parts stands the user's own code, which passes no mode along. The mode of a call is
therefore an implicit argument. Every thread has its own; compilers follow that, and no context variables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import local

from torch import nn

from .modes import ActiveMode


@dataclass(frozen=True)
class PartCalls:
    """What parts are to run for the time of one call of the whole.

    Attributes:
        rows: by the identity of the part.
        as_trained: whether they run the float chain, whatever their training flags say.
    """

    rows: Mapping[int, ActiveMode]
    as_trained: bool = False


class _OfThread(local):
    def __init__(self) -> None:
        self.calls: PartCalls | None = None


_NOW = _OfThread()


@contextmanager
def telling(calls: PartCalls) -> Iterator[None]:
    """Run a block in which parts are told what to run."""
    before = _NOW.calls
    _NOW.calls = calls
    try:
        yield
    finally:
        _NOW.calls = before


def told(part: nn.Module) -> tuple[ActiveMode | None, bool]:
    """What a part was told to run, if anything, and whether as in training."""
    calls = _NOW.calls
    active = None if calls is None else calls.rows.get(id(part))
    return active, active is not None and calls is not None and calls.as_trained
