"""Which mode a model runs at: `modes`, `set_bits`, `bits` and `at`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .modes import Mode
from .multi_mode import MultiModeModel
from .policy import Policy
from .prepared import Prepared
from .wrappers import as_multi_mode


class ModeView(nn.Module):
    """A prepared model seen at one mode; shares all parameters and holds no state of its own.

    Two views of one model may run in different threads.
    """

    def __init__(self, model: nn.Module, inner: MultiModeModel, mode: Mode | Policy) -> None:
        super().__init__()
        self.model = model
        self.mode = mode
        self.rows = inner.rows_of(mode) if isinstance(inner, Prepared) else None
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the view's mode."""
        if self.rows is None:
            return as_multi_mode(self.model).run(self.mode, args, kwargs)
        return self.model(*args, qcompile_mode=self.rows, **kwargs)


def modes(model: nn.Module) -> tuple[int | str, ...]:
    """The modes of a prepared or loaded model, increasing.

    Args:
        model: from `qcompile.prepare` or `qcompile.load`, or a wrapper around one.

    Returns:
        Bit-widths, or names such as `w2a4` where weights and activations differ; then `policy-1`, `policy-2`
        and so on for the policies of a file.

    Raises:
        InvalidInputType: if the model is neither.
    """
    return tuple(as_multi_mode(model).precisions)


def set_bits(model: nn.Module, bits: int | str | Mode | Policy) -> None:
    """Make one prepared mode, or a policy, the active one. No weights are copied.

    Args:
        model: from `qcompile.prepare` or `qcompile.load`, or a wrapper around one.
        bits: a bit-width, a name such as `w2a4`, a `Mode`, or a `Policy`.

    Raises:
        InvalidArgument: if the mode was not prepared; the message lists those that were.
        InvalidInputType: if the model was neither prepared nor loaded.
    """
    checked = as_multi_mode(model)
    checked.activate(checked.find(bits))


@contextmanager
def bits(model: nn.Module, value: int | str | Mode | Policy) -> Iterator[nn.Module]:
    """Run a block at one mode and return to the previous one afterwards.

    Args:
        model: from `qcompile.prepare` or `qcompile.load`, or a wrapper around one; the block is given it.
        value: a bit-width, a name such as `w2a4`, a `Mode`, or a `Policy`.

    Raises:
        InvalidArgument: if the mode was not prepared.
        InvalidInputType: if the model was neither prepared nor loaded.
    """
    checked = as_multi_mode(model)
    before = checked.active
    set_bits(checked, value)
    try:
        yield model
    finally:
        checked.activate(before)


def at(model: nn.Module, bits: int | str | Mode | Policy) -> ModeView:
    """A view of the model at one mode, for threads, teachers and serving; it shares every parameter.

    Args:
        model: from `qcompile.prepare` or `qcompile.load`, or a wrapper around one.
        bits: a bit-width, a name such as `w2a4`, a `Mode`, or a `Policy`.

    Returns:
        A module that is called like the model, through its wrappers; the active mode does not matter to it.

    Raises:
        InvalidArgument: if the mode was not prepared.
        InvalidInputType: if the model was neither prepared nor loaded.
    """
    checked = as_multi_mode(model)
    return ModeView(model, checked, checked.find(bits))
