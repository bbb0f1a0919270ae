"""A statement of the user's source, found by file and line, and what stands around it."""

from __future__ import annotations

import ast
import itertools
import linecache

from .source_lines import UserLine


class Place:
    """A statement in the user's file.

    Attributes:
        statement: the innermost statement that holds the line.
        next: the statement behind it.
        function: the function that it is in.
    """

    def __init__(self, statement: ast.stmt, after: ast.stmt | None, function: ast.FunctionDef) -> None:
        self.statement, self.next, self.function = statement, after, function

    @classmethod
    def of(cls, line: UserLine) -> Place | None:
        """None if the source cannot be read, or the line is in no function."""
        try:
            tree = ast.parse("".join(linecache.getlines(line.file)))
        except (SyntaxError, ValueError):
            return None
        holding = [one for one in ast.walk(tree) if _holds(one, line.number)]
        functions = [one for one in holding if isinstance(one, ast.FunctionDef)]
        if not functions:
            return None
        function = functions[-1]
        found: tuple[ast.stmt, ast.stmt | None] | None = None
        for one in ast.walk(function):
            for block in (getattr(one, name, None) for name in ("body", "orelse", "finalbody")):
                statements = block if isinstance(block, list) else []
                for statement, after in itertools.zip_longest(statements, statements[1:]):
                    later = found is None or statement.lineno > found[0].lineno
                    if _holds(statement, line.number) and later:
                        found = statement, after
        return None if found is None else cls(*found, function)

    @property
    def first_input(self) -> str:
        """Name of what the function takes first, the module itself aside."""
        names = [one.arg for one in self.function.args.args]
        return next((name for name in names[1:]), "x")

    def around(self, kind: type[ast.With]) -> ast.With | None:
        """The innermost block of a kind that holds the statement."""
        found = [
            one
            for one in ast.walk(self.function)
            if isinstance(one, kind) and _holds(one, self.statement.lineno)
        ]
        return found[-1] if found else None

    def made(self, name: str) -> ast.Assign | None:
        """The last assignment of a name before the statement."""
        found = [
            one
            for one in ast.walk(self.function)
            if isinstance(one, ast.Assign) and one.lineno < self.statement.lineno and name in targets_of(one)
        ]
        return max(found, key=lambda one: one.lineno, default=None)

    def is_size(self, name: str) -> bool:
        """Whether a name is used as a size, in a slice or a range."""
        for one in ast.walk(self.function):
            is_range = isinstance(one, ast.Call) and isinstance(one.func, ast.Name) and one.func.id == "range"
            if (is_range or isinstance(one, ast.Slice)) and name in names_in(one):
                return True
        return False


def _holds(node: ast.AST, number: int) -> bool:
    first, last = getattr(node, "lineno", None), getattr(node, "end_lineno", None)
    return first is not None and last is not None and first <= number <= last


def names_in(node: ast.AST) -> set[str]:
    """The variables in a piece of source."""
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}


def targets_of(statement: ast.AST) -> list[str]:
    """The variables that a statement assigns."""
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return [one.id for one in targets if isinstance(one, ast.Name)]
