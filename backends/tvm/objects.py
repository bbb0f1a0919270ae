"""Kernels as object files: each different one is compiled once, and kept for the next model.

The cache is a folder of object files, named by a hash of the kernel, the processor and TVM's version:
`QCOMPILE_CACHE`, else `~/.cache/qcompile`. It may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qcompile.backends.cache_folder import cache_folder

from .api import tvm

#: Bytes that the cache may hold; what was used least recently goes first.
LIMIT = 256 * 2**20

#: Kernels that are compiled at a time, at most.
MOST_AT_ONCE = 8


def compile_kernels(
    kernels: Mapping[str, Any], target: Any, folder: Path
) -> tuple[dict[str, str], list[str]]:
    """Write one object per different kernel into a folder.

    Args:
        kernels: PrimFuncs by name.
        target: what they are compiled for.
        folder: for the objects.

    Returns:
        The symbol of every kernel by its name, and the objects' file names.
    """
    symbols = {name: _symbol(kernel, target) for name, kernel in kernels.items()}
    different = {symbol: kernels[name] for name, symbol in symbols.items()}
    with ThreadPoolExecutor(min(MOST_AT_ONCE, len(os.sched_getaffinity(0)))) as pool:
        made = [
            pool.submit(_provide, symbol, kernel, target, folder / f"{symbol}.o")
            for symbol, kernel in different.items()
        ]
        for one in made:
            one.result()
    return symbols, [f"{symbol}.o" for symbol in different]


def _symbol(kernel: Any, target: Any) -> str:
    """A name that says everything that the object depends on."""
    content = tvm.ir.save_json(kernel.without_attr("global_symbol"))
    key = hashlib.sha256(f"{tvm.__version__}\n{target}\n{content}".encode())
    return f"qcompile_{key.hexdigest()[:24]}"


def _provide(symbol: str, kernel: Any, target: Any, wanted: Path) -> None:
    kept = cache_folder() / wanted.name
    try:
        shutil.copyfile(kept, wanted)
        os.utime(kept)
        return
    except OSError:
        pass
    compiled = tvm.compile(tvm.IRModule({symbol: kernel.with_attr("global_symbol", symbol)}), target=target)
    compiled.mod.write_to_file(str(wanted), "o")
    try:
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as made:  # so that no half of a file is ever kept
            shutil.copyfile(wanted, Path(made) / wanted.name)
            os.replace(Path(made) / wanted.name, kept)
        _prune(kept.parent)
    except OSError:
        pass  # a cache that cannot be written is no reason to fail


def _prune(folder: Path) -> None:
    entries = sorted(
        ((one.stat().st_mtime, one.stat().st_size, one.path) for one in os.scandir(folder) if one.is_file()),
        reverse=True,
    )
    used = 0
    for _, size, path in entries:
        used += size
        if used > LIMIT:
            os.unlink(path)
