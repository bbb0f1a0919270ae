"""Passes over torch.fx graphs, and the manager that runs a list of them.

A pass is a small class with one method `call(graph_module) -> PassResult`. What it needs from a graph and
what it promises about its result are two lists of named predicates, `requires` and `ensures`; both are
checked every time the pass runs. Set `QCOMPILE_LOG=passes` to see one line per pass on standard error, and
`QCOMPILE_DUMP=<folder>` (or `PassManager(dump=...)`) to write every graph before and after each pass.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import fx

from qcompile.errors import FileAccessError, PassError, PostconditionError, PreconditionError, QCompileError


@dataclass(frozen=True)
class Condition:
    """A named property of a graph.

    Attributes:
        name: what the property says, in words that complete the sentence "the graph ...".
        check: returns None if the property holds, else what breaks it (a node, a layer).
    """

    name: str
    check: Callable[[fx.GraphModule], str | None]


@dataclass(frozen=True)
class PassResult:
    """Outcome of one pass.

    Attributes:
        graph_module: the rewritten graph; may be the object that was passed in.
        modified: whether anything changed.
        notes: one line per rewrite that a user may want to read.
    """

    graph_module: fx.GraphModule
    modified: bool
    notes: tuple[str, ...] = ()


class Pass:
    """Base of all passes; subclasses define `call` and may list conditions."""

    requires: ClassVar[Sequence[Condition]] = ()
    ensures: ClassVar[Sequence[Condition]] = ()

    @property
    def name(self) -> str:
        """Name in logs and errors."""
        return type(self).__name__

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph in place or return a new one."""
        raise TypeError(f"{self.name} does not define call()")

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Check what is required, run the pass, check what is ensured.

        Raises:
            PreconditionError: if the graph lacks what the pass requires.
            PostconditionError: if the result lacks what the pass promises (a defect of the pass).
            PassError: if the pass fails with an error of its own that is not a QCompileError.
        """
        for condition in self.requires:
            broken = condition.check(graph_module)
            if broken is not None:
                raise PreconditionError(f"{self.name} requires that the graph {condition.name}: {broken}")
        try:
            result = self.call(graph_module)
            result.graph_module.graph.lint()
        except QCompileError:
            raise
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as cause:
            reason = (str(cause) or type(cause).__name__).splitlines()[0]
            raise PassError(f"{self.name} failed: {reason}") from cause
        result.graph_module.recompile()
        for condition in self.ensures:
            broken = condition.check(result.graph_module)
            if broken is not None:
                raise PostconditionError(f"{self.name} promised that the graph {condition.name}: {broken}")
        return result


class PassManager:
    """Run passes in order.

    Args:
        passes: the passes.
        dump: folder for the graphs before and after each pass; defaults to the environment's QCOMPILE_DUMP.
    """

    def __init__(self, passes: Iterable[Pass], dump: str | Path | None = None) -> None:
        self.passes = tuple(passes)
        self.dump = Path(dump) if dump is not None else _dump_folder_from_environment()
        self.notes: list[str] = []

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Run every pass once. Raises what the passes raise."""
        modified = False
        for index, one in enumerate(self.passes):
            self._write(graph_module, f"{index:02d}-{one.name}-before.txt")
            started = time.perf_counter()
            before = len(graph_module.graph.nodes)
            result = one(graph_module)
            graph_module = result.graph_module
            modified |= result.modified
            self.notes.extend(f"{one.name}: {note}" for note in result.notes)
            state = "modified" if result.modified else "unchanged"
            size = f"{before} -> {len(graph_module.graph.nodes)} nodes"
            seconds = time.perf_counter() - started
            notes = (f"  {note}" for note in result.notes)
            log_line("passes", f"{one.name}: {state}, {size}, {1e3 * seconds:.1f} ms", *notes)
            self._write(graph_module, f"{index:02d}-{one.name}-after.txt")
        return PassResult(graph_module, modified, tuple(self.notes))

    def _write(self, graph_module: fx.GraphModule, name: str) -> None:
        if self.dump is not None:
            text = f"{graph_module.graph}\n\n{graph_module.graph.python_code('self').src}"
            try:
                self.dump.mkdir(parents=True, exist_ok=True)
                (self.dump / name).write_text(text)
            except OSError as cause:
                reason = cause.strerror or cause
                raise FileAccessError(f"cannot write graphs to {self.dump}: {reason}") from cause


def log_line(topic: str, *lines: str) -> None:
    """Print lines on standard error if the topic is listed in the environment's QCOMPILE_LOG."""
    if topic in os.environ.get("QCOMPILE_LOG", "").split(","):
        for line in lines:
            print(f"qcompile.{topic}: {line}", file=sys.stderr)


def _dump_folder_from_environment() -> Path | None:
    folder = os.environ.get("QCOMPILE_DUMP")
    return Path(folder) if folder else None
