"""Where commands draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InvalidArgument, MissingExtra

#: What plots are written as.
FORMATS = (".svg", ".png", ".pdf")


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure, sizes in inches.

    Raises:
        MissingExtra: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as cause:
        raise MissingExtra("--plot needs matplotlib: pip install 'qcompile[report]'") from cause
    return Figure(figsize=(width, height), layout="constrained")


def check_plot(path: Path | None) -> None:
    """Refuse before the long work.

    Raises:
        InvalidArgument: if the name does not say a known format.
        MissingExtra: if matplotlib is not installed.
    """
    if path is None:
        return
    if path.suffix not in FORMATS:
        raise InvalidArgument(f"--plot {path} ends in none of {', '.join(FORMATS)}")
    new_figure(1, 1)
