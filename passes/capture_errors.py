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
from qcompile.passes.smallest_change import (
    for_autocast,
    for_batch,
    for_cond,
    for_numpy,
    for_text,
    for_values,
    makes_list,
)
from qcompile.passes.source_lines import UNKNOWN_LINE, UserLine, line_of_error, line_of_stack

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
_WITH_EXAMPLES: tuple[tuple[re.Pattern[str], str, Callable[[UserLine], str]], ...] = (
    (
        re.compile(r"data-dependent|unbacked|\.item\(\)|GuardOnDataDependent", re.I),
        "control flow or a size depends on the values of a tensor",
        for_values,
    ),
    (re.compile(r"numpy|__array"), "a tensor becomes a numpy array", for_numpy),
    (re.compile(r"__format__"), "the value of a tensor is made text", for_text),
)
_WITHOUT_EXAMPLES = (
    (re.compile(r"item assignment"), "a value is assigned into a tensor"),
    (
        re.compile(r"symbolically traced variables cannot be used|iterated"),
        "control flow depends on an input",
    ),
    (re.compile(r"Proxy"), "a number or an array is made of an input"),
)


_SIZE = re.compile(r"marked [^\n]*size\(\)\[(\d+)\]")


def uncapturable(model: nn.Module, examples: Examples, error: BaseException) -> CaptureError:
    """The error for a model that torch.export cannot trace, or that fails on its own examples."""
    failure = _run(model, examples.args, examples.kwargs)
    if failure is not None:
        alone = examples.single_sample
        if alone is not None and _run(model, alone.args, alone.kwargs) is None:
            return _fixed_batch(line_of_error(failure), 1)
        return failing_model(failure)
    line = line_of_error(error) or line_of_stack(str(error))
    text = f"{type(error).__name__} {error}"
    for pattern, reason, advice in _WITH_EXAMPLES:
        if pattern.search(text):
            return _refused(line, reason, advice)
    return _refused(
        line, f"torch.export cannot trace this ({_first_line(error)})", lambda _: "rewrite this line"
    )


def _refused(line: UserLine | None, reason: str, advice: Callable[[UserLine], str]) -> CaptureError:
    where = UNKNOWN_LINE if line is None else str(line)
    way_out = "rewrite it" if line is None else advice(line)
    return CaptureError(f"{where}: {reason}; {way_out}", None if line is None else (line.file, line.number))


def blocked(line: UserLine | None, name: str) -> CaptureError:
    """The error for a block of the user's code that torch.export keeps as one (autocast, cond)."""
    advice = {"autocast": for_autocast, "cond": for_cond}.get(name, lambda _: "use it outside of forward")
    return _refused(line, f"a block of '{name}' inside forward cannot be captured", advice)


def size_of_values(line: UserLine | None) -> CaptureError:
    """The error for a tensor whose size follows from values, such as the rows that a mask picks."""
    return _refused(
        line,
        "the size of a tensor depends on the values of another",
        lambda _: "keep all of its elements and multiply those that are not wanted by 0",
    )


def failing_model(failure: BaseException) -> CaptureError:
    """The error for a model that cannot run on its own examples."""
    return CaptureError(
        f"{line_of_error(failure) or UNKNOWN_LINE}: the model itself fails on example_inputs "
        f"({_first_line(failure)}); pass an example that it accepts"
    )


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


def hard_coded_size(examples: Examples, error: str, retrace: Callable[[], object]) -> CaptureError:
    """The error for a model that works at one batch size only, or one size of an open dimension.

    Args:
        examples: the inputs.
        error: torch's message.
        retrace: traces the model again, which fails again; torch's log then tells where the batch became a
            number.
    """
    finder = _SpecialisationFinder()
    logger = logging.getLogger(SHAPES_LOGGER)
    disabled, level, propagate = logger.disabled, logger.level, logger.propagate
    logger.disabled, logger.propagate = False, False
    logger.setLevel(logging.INFO)
    handlers, logger.handlers = logger.handlers, [finder]
    try:
        retrace()
    except TRACING_ERRORS:
        pass  # it is the failure that we are looking into
    finally:
        logger.handlers = handlers
        logger.disabled, logger.propagate = disabled, propagate
        logger.setLevel(level)  # forgets what the logger remembers of levels
    place = _SIZE.search(error)
    opened = [one for ones in examples.open for one in ones]
    for one in opened:
        if (place is not None and int(place[1]) == one.dim > 0) or f"marked {one.name} " in error:
            line = finder.line
            where = UNKNOWN_LINE if line is None else str(line)
            way_out = (
                "leave it out of dynamic_shapes" if line is None else for_batch(line, one.example, one.dim)
            )
            return CaptureError(
                f"{where}: the model fixes dimension {one.dim} ({one.name!r}) to {one.example}; {way_out}"
            )
    return _fixed_batch(finder.line, examples.batch)


def _fixed_batch(line: UserLine | None, batch: int | None) -> CaptureError:
    if line is not None and makes_list(line):
        return _refused(line, "the values of a tensor become a list of numbers", for_values)
    where = UNKNOWN_LINE if line is None else str(line)
    way_out = "use x.shape[0] in place of the number" if line is None else for_batch(line, batch)
    return CaptureError(f"{where}: the model fixes the batch size to {batch}; {way_out}")


class _SpecialisationFinder(logging.Handler):
    """Remembers the user's line at which a symbolic size first became a number."""

    def __init__(self) -> None:
        super().__init__()
        self.line: UserLine | None = None

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
