"""AMX for tests: the processor's, or an emulation of the instructions that traps them."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path

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
