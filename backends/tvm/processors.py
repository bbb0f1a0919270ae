"""Kinds of processors that one artefact serves; the first whose instructions are there runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qcompile.errors import InvalidArgument, LoweringError

from . import api


@dataclass(frozen=True)
class Processor:
    """One kind.

    Attributes:
        name: suffix of symbols, and what users write in `features=`.
        target: attributes of TVM's LLVM target: the oldest such processor.
        features: what families of kernels may need.
        condition: C expression that is true where it runs.
    """

    name: str
    target: Mapping[str, Any]
    features: frozenset[str]
    condition: str


@dataclass(frozen=True, eq=False)
class Architecture:
    """What a target of this backend compiles for; there is one object of each.

    Attributes:
        name: the target's.
        machine: `platform.machine()` of such devices.
        triple: LLVM's name of the platform.
        compiler, package: the C compiler, and the Debian package that holds it.
        emulator, emulator_package: the same for user-mode emulation; empty if there is none.
        sysroot: where the emulator finds libraries of the platform.
        processors: kinds, the fastest first; each has the features of the next.
        features: LLVM's names of the features that families need.
    """

    name: str
    machine: tuple[str, ...]
    triple: str
    compiler: str
    package: str
    emulator: str
    emulator_package: str
    sysroot: str
    processors: tuple[Processor, ...]
    features: Mapping[str, str]


def _cpu(name: str) -> str:
    return f'__builtin_cpu_supports("{name}")'


_ICE_LAKE = (
    "avx512bitalg",
    "avx512vpopcntdq",
    "avx512ifma",
    "avx512vbmi",
    "avx512vbmi2",
    "avx512cd",
    "gfni",
    "vpclmulqdq",
    "pclmul",
    "aes",
    "bmi2",
)
_AVX2 = f"{_cpu('avx2')} && {_cpu('fma')}"
_AVX512 = f"{_cpu('avx512f')} && {_cpu('avx512bw')} && {_cpu('avx512dq')} && {_cpu('avx512vl')}"
_VNNI = f"{_AVX512} && {_cpu('avx512vnni')}"
# what the oldest processor with these counts has besides, and LLVM may use
_BITALG = " && ".join((_VNNI, *(_cpu(one) for one in _ICE_LAKE)))

X86 = Architecture(
    "x86",
    ("x86_64", "AMD64"),
    "x86_64-linux-gnu",
    "gcc",
    "gcc",
    "",
    "",
    "",
    (
        Processor(
            "amx",
            {"mcpu": "sapphirerapids"},
            frozenset(("amx", "bitalg", "vnni", "avx512", "avx2")),
            f"{_BITALG} && has_tiles()",
        ),
        Processor(
            "bitalg",
            {"mcpu": "icelake-server"},
            frozenset(("bitalg", "vnni", "avx512", "avx2")),
            _BITALG,
        ),
        Processor("vnni", {"mcpu": "cascadelake"}, frozenset(("vnni", "avx512", "avx2")), _VNNI),
        Processor("avx2", {"mcpu": "haswell"}, frozenset(("avx2",)), _AVX2),
    ),
    {
        "amx": "amx-int8",
        "bitalg": "avx512bitalg",
        "vnni": "avx512vnni",
        "avx512": "avx512bw",
        "avx2": "avx2",
    },
)

ARM = Architecture(
    "arm",
    ("aarch64", "arm64"),
    "aarch64-linux-gnu",
    "aarch64-linux-gnu-gcc",
    "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
    "qemu-aarch64",
    "qemu-user",
    "/usr/aarch64-linux-gnu",
    (
        Processor(
            "dotprod", {"mattr": ["+neon", "+dotprod"]}, frozenset(("dotprod", "neon")), "has_dotprod()"
        ),
        Processor("neon", {"mattr": ["+neon"]}, frozenset(("neon",)), "1"),
    ),
    {"dotprod": "dotprod", "neon": "neon"},
)


def select(
    architecture: Architecture, cpu: str | None, features: Sequence[str] | None
) -> tuple[Processor, ...]:
    """The kinds to compile for.

    Args:
        architecture: of the device.
        cpu: LLVM's name of the processor to serve: the best kind that it belongs to; or None.
        features: names of the kinds to serve, or None for all.

    Raises:
        InvalidArgument: if a name is unknown, or both are given.
        LoweringError: if that processor has no instructions that kernels exist for.
    """
    if cpu is not None and features is not None:
        raise InvalidArgument("pass cpu= or features=, not both: a cpu has its features")
    if cpu is not None:
        return (_named(architecture, cpu),)
    if features is None:
        return architecture.processors
    known = {one.name: one for one in architecture.processors}
    unknown = [one for one in features if one not in known]
    if unknown or not features:
        raise InvalidArgument(
            f"features {', '.join(map(repr, unknown)) or 'are empty'}: the target {architecture.name} knows "
            f"{', '.join(known)}"
        )
    return tuple(one for name, one in known.items() if name in features)


def _named(architecture: Architecture, cpu: str) -> Processor:
    known = api.processors(architecture.triple)
    if cpu not in known:
        near = [one for one in known if one.split("-")[0] == cpu.split("-")[0]] or known
        raise InvalidArgument(
            f"cpu {cpu!r} is unknown for the target {architecture.name}; LLVM knows {', '.join(near)}"
        )
    has = api.features(architecture.triple, cpu)
    for one in architecture.processors:
        if all(architecture.features[feature] in has for feature in one.features):
            return one
    needed = ", ".join(architecture.features[one] for one in architecture.processors[-1].features)
    raise LoweringError(
        f"cpu {cpu!r} lacks {needed}, which kernels of the target {architecture.name} need; lower to onnx-qdq"
    )
