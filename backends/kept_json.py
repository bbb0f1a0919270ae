"""What was measured on this machine, kept in the cache folder as JSON."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from .cache_folder import cache_folder


def machine_name() -> str:
    """The processor and how many of it this process may use."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = named[0] if named else name
    affinity = getattr(os, "sched_getaffinity", None)
    return f"{name}, {len(affinity(0)) if affinity else os.cpu_count()} cores"


def place_of(kind: str, key: Any) -> Path:
    """Where something of a kind is kept; `key` is all that it depends on, as JSON values."""
    return cache_folder() / kind / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"


def read_kept(path: Path) -> Any:
    """JSON values; None if there are none."""
    with suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def keep(path: Path, content: Any) -> None:
    """Write JSON values, whole or not at all."""
    with suppress(OSError):  # a cache that cannot be written is none
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as made:
            written = Path(made) / path.name
            written.write_text(json.dumps(content, indent=1), encoding="utf-8")
            os.replace(written, path)
