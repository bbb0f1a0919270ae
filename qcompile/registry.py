"""Schemes and targets are found through entry points, so third parties add theirs without a change here."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from .errors import InvalidArgument, InvalidInputType

if TYPE_CHECKING:
    from .backends.target import Target
    from .passes.schemes.base import Scheme


def schemes() -> tuple[str, ...]:
    """Names that `prepare(scheme=...)` accepts."""
    return tuple(sorted({point.name for point in entry_points(group="qcompile.schemes")}))


def targets() -> tuple[str, ...]:
    """Names that `lower(target=...)` accepts."""
    return tuple(sorted({point.name for point in entry_points(group="qcompile.targets")}))


def find_scheme(name: str) -> type[Scheme]:
    """The scheme class of a name.

    Raises:
        InvalidArgument: listing the known schemes.
    """
    return _find("scheme", "qcompile.schemes", name)


def find_target(name: str) -> type[Target]:
    """The target class of a name.

    Raises:
        InvalidArgument: listing the known targets.
        MissingExtra: if the target's packages are not installed.
    """
    return _find("target", "qcompile.targets", name)


def _find(kind: str, group: str, name: str) -> Any:
    if not isinstance(name, str):
        raise InvalidInputType(f"a {kind} is given by its name, not {name!r}")
    points = {point.name: point for point in entry_points(group=group)}
    if name not in points:
        raise InvalidArgument(f"unknown {kind} {name!r}; known: {', '.join(sorted(points))}")
    return points[name].load()
