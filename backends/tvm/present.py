"""Which kind of processor this machine is: what a shared object without any kernels chooses here."""

from __future__ import annotations

import functools
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qcompile.errors import LoweringError

from .artefact import Artefact, Variant
from .build import Part, build
from .library import Library
from .plan import Plan
from .processors import Architecture, Processor


def present(architecture: Architecture, processors: Sequence[Processor]) -> Processor | None:
    """The first of some kinds whose instructions this machine has; None if it is a machine of another kind.

    Raises:
        LoweringError: if the C compiler fails.
        MissingExtra: if it is not installed.
    """
    here = _names(architecture) if platform.machine() in architecture.machine else ()
    return next((one for one in processors if one.name in here), None)


@functools.cache
def _names(architecture: Architecture) -> tuple[str, ...]:
    """The fastest kind, and those behind it: each has all instructions of the next."""
    plan = Plan((), (), (), (), 0, b"")
    parts = [Part(one.name, one.condition, plan, {}, None) for one in architecture.processors]
    names = tuple(one.name for one in architecture.processors)
    variants = {name: Variant(name, plan, {}, {}, {}) for name in names}
    with tempfile.TemporaryDirectory(prefix="qcompile-present-") as made:
        folder = Path(made) / "model"
        library = Library(Artefact(architecture, folder, build(architecture, parts, folder), variants), 1)
        try:
            return names[names.index(library.variant().name) :]
        except LoweringError:
            return ()
