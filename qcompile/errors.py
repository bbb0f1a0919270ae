"""Everything that qcompile raises on purpose.

Each error derives from `QCompileError` and from the built-in exception that fits; callers may catch either.
Messages are one line: the layer or file, the value, and the way out.
"""

from __future__ import annotations


class QCompileError(Exception):
    """Base of all errors that qcompile raises on purpose."""


class InvalidArgument(QCompileError, ValueError):
    """A value that the caller passed cannot be used (unknown name, bits out of range, wrong shape)."""


class InvalidInputType(QCompileError, TypeError):
    """An argument has the wrong type or dtype."""


class CaptureError(QCompileError, RuntimeError):
    """A model could not be turned into a graph; the message names the user's line that stopped it.

    Attributes:
        place: file and line, where other modules of the model could still be captured.
    """

    def __init__(self, message: str, place: tuple[str, int] | None = None) -> None:
        super().__init__(message)
        self.place = place


class PassError(QCompileError, RuntimeError):
    """A pass met a graph that it cannot rewrite."""


class PreconditionError(PassError):
    """A graph does not satisfy what a pass requires."""


class PostconditionError(PassError):
    """A pass left a graph that does not satisfy what the pass promises."""


class FoldError(QCompileError, ArithmeticError):
    """A chain between two quantised layers cannot be expressed in the integers that the contract allows."""


class FileFormatError(QCompileError, ValueError):
    """A `.qcm` file is damaged, hostile, or not a `.qcm` file."""


class FileAccessError(QCompileError, OSError):
    """A path cannot be read or written."""


class LoweringError(QCompileError, RuntimeError):
    """A target cannot express an operator; the message names the layer."""


class MissingExtra(QCompileError, ImportError):
    """An optional dependency is not installed; the message carries the pip command."""
