"""Where this library keeps what it would else compile or measure again."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path


def cache_folder() -> Path:
    """`QCOMPILE_CACHE`, else `~/.cache/qcompile`; it may be deleted at any time."""
    given = os.environ.get("QCOMPILE_CACHE")
    if given is None and "HOME" not in os.environ and "XDG_CACHE_HOME" not in os.environ:
        return _private_folder()
    return (
        Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "qcompile"
    )


@cache
def _private_folder() -> Path:
    """Without a home: a folder of this process, because code from a folder that others can make is theirs."""
    return Path(tempfile.mkdtemp(prefix="qcompile-"))
