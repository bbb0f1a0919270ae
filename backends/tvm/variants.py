"""Kinds of processors that one artefact serves; the first whose instructions are there runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .kernels.layer import Dot
from .kernels.x86 import VNNI, avx2


@dataclass(frozen=True)
class Processor:
    """One kind.

    Attributes:
        name: suffix of symbols.
        mcpu: LLVM's name of the oldest such processor.
        condition: C expression that is true where it runs.
        dot: dot product for (largest code, largest weight).
    """

    name: str
    mcpu: str
    condition: str
    dot: Callable[[int, int], Dot]


X86 = (
    Processor("vnni", "cascadelake", '__builtin_cpu_supports("avx512vnni")', lambda code, weight: VNNI),
    Processor("avx2", "haswell", '__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")', avx2),
)
