"""AMX for tests: the processor's, or an emulation of the instructions that traps them."""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

FLAGS = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()


@cache
def provide_amx() -> ctypes.CDLL | None:
    """Make AMX-int8 executable in this process; returns the emulator where the processor lacks it."""
    if "amx_int8" in FLAGS:
        ctypes.CDLL(None).syscall(158, 0x1023, 18)  # arch_prctl(ARCH_REQ_XCOMP_PERM, tile data)
        return None
    folder = Path(tempfile.mkdtemp(prefix="amx-"))
    source = Path(__file__).with_name("amx_emulator.c")
    command = ["gcc", "-O2", "-shared", "-fPIC", "-o", str(folder / "amx.so"), str(source)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "amx.so"))


def run_amx_kernels(monkeypatch: Any) -> ctypes.CDLL | None:
    """Let the target x86 run kernels for AMX here; returns the emulator where the processor lacks it."""
    from qcompile.backends.tvm import processors

    emulator = provide_amx()
    if emulator is not None:
        everywhere = tuple(dataclasses.replace(one, condition="1") for one in processors.X86.processors)
        monkeypatch.setattr(processors, "X86", dataclasses.replace(processors.X86, processors=everywhere))
    return emulator
