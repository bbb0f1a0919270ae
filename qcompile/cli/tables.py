"""Tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2))


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table with one column per key; numbers are aligned to the right."""
    table = Table(title=title)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    for key in keys:
        numeric = all(isinstance(row.get(key, 0), (int, float)) for row in rows)
        table.add_column(key, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_shown(row.get(key, "")) for key in keys))
    Console().print(table)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10 else f"{value:.2f}"
    return "" if value is None else str(value)
