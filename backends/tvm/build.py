"""From a plan and kernels to a shared object: tables for the driver, objects, one call of the compiler."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.errors import LoweringError, MissingExtra

from .api import tvm
from .plan import Place, Plan

SOURCES = Path(__file__).parent
LIBRARY = "libmodel.so"
KINDS = {"arena": "ARENA", "constant": "CONSTANT", "input": "INPUT", "output": "OUTPUT"}
CODES = {"i": 0, "u": 1, "f": 2, "b": 6}


@dataclass(frozen=True)
class Variant:
    """Kernels for one kind of processor.

    Attributes:
        name: suffix of its symbols.
        mcpu: LLVM's name of the oldest such processor.
        condition: C expression that is true where it runs.
        kernels: PrimFuncs by the plan's symbol.
    """

    name: str
    mcpu: str
    condition: str
    kernels: Mapping[str, Any]


def tables(plan: Plan, variants: Sequence[Variant]) -> str:
    """plan.h: the plan as C tables."""
    places: dict[Place, int] = {}
    for call in plan.calls:
        for one in call.arguments:
            places.setdefault(one, len(places))
    extents: list[int] = []
    records: list[str] = []
    calls: list[str] = []
    arguments: list[int] = []
    for place in places:
        dtype = np.dtype(place.dtype)
        records.append(
            f"{{{KINDS[place.kind]}, {CODES[dtype.kind]}, {8 * dtype.itemsize}, {len(place.shape)}, "
            f"{len(extents)}, {place.position}}}"
        )
        extents += place.shape or (1,)
    symbols = list(dict.fromkeys(call.kernel for call in plan.calls))
    for call in plan.calls:
        calls.append(f"{{{symbols.index(call.kernel)}, {len(call.arguments)}, {len(arguments)}}}")
        arguments += [places[one] for one in call.arguments]
    lines = [
        "enum { ARENA, CONSTANT, INPUT, OUTPUT };",
        "typedef struct { uint8_t kind, code, bits, dimensions; uint32_t extents; uint64_t position; }",
        "    tensor_record;",
        "typedef struct { uint32_t kernel, count, first; } call_record;",
        f"enum {{ TENSORS = {len(places)}, CALLS = {len(plan.calls)}, ",
        f"       MOST_ARGUMENTS = {max(len(call.arguments) for call in plan.calls)} }};",
        f"static const uint64_t ARENA_BYTES = {plan.arena};",
        f"static const int64_t extents[] = {{{', '.join(map(str, extents))}}};",
        f"static const tensor_record tensors[] = {{{', '.join(records)}}};",
        f"static const call_record calls[] = {{{', '.join(calls)}}};",
        f"static const uint32_t arguments[] = {{{', '.join(map(str, arguments))}}};",
        '__attribute__((visibility("hidden"))) extern const unsigned char qcompile_constants[];',
    ]
    for variant in variants:
        names = [f"__tvm_ffi_{one}_{variant.name}" for one in symbols]
        lines += [f"int {one}(void *, const argument *, int32_t, argument *);" for one in names]
        lines.append(f"static const kernel kernels_{variant.name}[] = {{{', '.join(names)}}};")
    lines.append("static const kernel *choose_kernels(void) {")
    lines += [f"    if ({one.condition}) return kernels_{one.name};" for one in variants]
    lines += ["    return NULL;", "}", f'#define REQUIRED "{variants[-1].name}"', ""]
    return "\n".join(lines)


def build(plan: Plan, variants: Sequence[Variant], folder: Path, compiler: str) -> Path:
    """Write sources and objects into a folder and link them.

    Raises:
        MissingExtra: if the C compiler is not installed.
        LoweringError: if it fails.
    """
    if shutil.which(compiler) is None:
        raise MissingExtra(f"lowering to machine code needs the C compiler {compiler}: apt-get install gcc")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("driver.c", "model.h"):
        shutil.copyfile(SOURCES / name, folder / name)
    (folder / "plan.h").write_text(tables(plan, variants))
    (folder / "constants.bin").write_bytes(plan.constants or bytes(64))
    (folder / "constants.S").write_text(
        ".section .rodata\n.balign 64\n.global qcompile_constants\n.hidden qcompile_constants\n"
        "qcompile_constants:\n"
        '.incbin "constants.bin"\n'
        '.section .note.GNU-stack,"",%progbits\n'
    )
    objects = []
    for variant in variants:
        renamed = {
            f"{name}_{variant.name}": kernel.with_attr("global_symbol", f"{name}_{variant.name}")
            for name, kernel in variant.kernels.items()
        }
        target = tvm.target.Target({"kind": "llvm", "mcpu": variant.mcpu})
        compiled = tvm.compile(tvm.IRModule(renamed), target=target)
        objects.append(f"kernels_{variant.name}.o")
        compiled.mod.write_to_file(str(folder / objects[-1]), "o")
    command = [compiler, "-O2", "-std=gnu11", "-shared", "-fPIC", "-fvisibility=hidden", "-o", LIBRARY]
    done = subprocess.run(
        [*command, "driver.c", "constants.S", *objects, "-lpthread", "-lm"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise LoweringError(f"{compiler} failed: {done.stderr.strip().splitlines()[-1]}")
    return folder / LIBRARY
