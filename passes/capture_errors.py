"""One line for a model that cannot be captured: the user's line, the reason in few words, what to do."""

from __future__ import annotations

import copy
import logging
import re
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from qcompile.errors import CaptureError
from qcompile.passes.example_inputs import Examples
from qcompile.passes.source_lines import UNKNOWN_LINE, line_of_error, line_of_stack

# Where torch.export reports what it learns about symbolic sizes.
SHAPES_LOGGER = "torch.fx.experimental.symbolic_shapes"

# What tracing and running a user's forward raises.
TRACING_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
    ArithmeticError,
)

# (what torch says, what that means)
_DATA_DEPENDENT = re.compile(r"data-dependent|unbacked|\.item\(\)|GuardOnDataDependent", re.I)
_WITHOUT_EXAMPLES = (
    (re.compile(r"item assignment"), "a value is assigned into a tensor"),
    (
        re.compile(r"symbolically traced variables cannot be used|iterated"),
        "control flow depends on an input",
    ),
    (re.compile(r"Proxy"), "a number or an array is made of an input"),
)


def uncapturable(model: nn.Module, examples: Examples, error: BaseException) -> CaptureError:
    """The error for a model that torch.export cannot trace, or that fails on its own examples."""
    failure = _run(model, examples.args, examples.kwargs)
    if failure is not None:
        return CaptureError(
            f"{line_of_error(failure) or UNKNOWN_LINE}: the model itself fails on example_inputs "
            f"({_first_line(failure)}); pass an example that it accepts"
        )
    line = line_of_error(error) or line_of_stack(str(error)) or UNKNOWN_LINE
    if _DATA_DEPENDENT.search(str(error)) or _DATA_DEPENDENT.search(type(error).__name__):
        return CaptureError(
            f"{line}: control flow, a size or an index depends on the values of a tensor; rewrite it with "
            "torch.where, write at i[None] instead of i, or move it out of forward"
        )
    return CaptureError(f"{line}: torch.export cannot trace this ({_first_line(error)}); rewrite this line")


def untraceable(error: BaseException) -> CaptureError:
    """The error for a model that symbolic tracing without examples cannot follow."""
    line = line_of_error(error) or UNKNOWN_LINE
    for pattern, reason in _WITHOUT_EXAMPLES:
        if pattern.search(str(error)):
            return CaptureError(
                f"{line}: {reason}, which tracing without examples cannot follow; pass example_inputs"
            )
    return CaptureError(
        f"{line}: tracing without examples failed ({_first_line(error)}); pass example_inputs"
    )


def hard_coded_batch(examples: Examples, retrace: Callable[[], object]) -> CaptureError:
    """The error for a model that works at one batch size only.

    Args:
        examples: the inputs.
        retrace: traces the model again, which fails again; torch's log then tells where the batch became a
            number.
    """
    finder = _SpecialisationFinder()
    logger = logging.getLogger(SHAPES_LOGGER)
    before = logger.disabled, logger.level, logger.propagate
    logger.disabled, logger.propagate = False, False
    logger.setLevel(logging.INFO)
    handlers, logger.handlers = logger.handlers, [finder]
    try:
        retrace()
    except TRACING_ERRORS:
        pass  # it is the failure that we are looking into
    finally:
        logger.handlers = handlers
        logger.disabled, logger.level, logger.propagate = before
    return CaptureError(
        f"{finder.line or UNKNOWN_LINE}: the model fixes the batch size to {examples.batch}; "
        "use x.shape[0] or -1 instead of the number, so that it takes any batch"
    )


class _SpecialisationFinder(logging.Handler):
    """Remembers the user's line at which a symbolic size first became a number."""

    def __init__(self) -> None:
        super().__init__()
        self.line: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.line is None and record.msg.startswith("set_replacement"):
            self.line = line_of_stack("".join(traceback.format_stack()))


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BaseException | None:
    """Run a copy of the model; returns what it raised."""
    args, kwargs = copy.deepcopy((args, dict(kwargs)))
    with torch.no_grad():
        try:
            copy.deepcopy(model)(*args, **kwargs)
        except TRACING_ERRORS as failure:
            return failure
    return None


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= 160 else text[:157] + "..."
