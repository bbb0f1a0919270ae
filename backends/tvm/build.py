"""From plans and kernels to a shared object: tables for the driver, objects, one call of the compiler."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.backends.cache_folder import cache_folder
from qcompile.errors import LoweringError, MissingExtra

from .maps import round_up
from .objects import compile_kernels
from .plan import ALIGNMENT, Place, Plan
from .processors import Architecture

SOURCES = Path(__file__).parent
LIBRARY = "libmodel.so"
RUNNER = "runner"
DRIVER = ("driver.c", "model.h", "runner.c")
KINDS = {"arena": "ARENA", "constant": "CONSTANT", "input": "INPUT", "output": "OUTPUT"}
CODES = {"i": 0, "u": 1, "f": 2, "b": 6}


@dataclass(frozen=True)
class Part:
    """The model for one kind of processor.

    Attributes:
        name: suffix of its symbols.
        condition: C expression that is true where it runs.
        plan: what it executes.
        kernels: PrimFuncs by the plan's symbols.
        target: what they are compiled for.
    """

    name: str
    condition: str
    plan: Plan
    kernels: Mapping[str, Any]
    target: Any


class Constants:
    """The constants of all parts in one block, equal ones once."""

    def __init__(self) -> None:
        self.content = bytearray()
        self._positions: dict[bytes, int] = {}

    def position(self, plan: Plan, place: Place) -> int:
        """Where a constant of a plan lies in the block."""
        data = plan.constants[place.position : place.position + place.bytes]
        if data not in self._positions:
            self._positions[data] = len(self.content)
            self.content += data.ljust(round_up(len(data), ALIGNMENT), b"\0")
        return self._positions[data]


def tables(parts: Sequence[Part], symbols: Sequence[Mapping[str, str]], constants: Constants) -> str:
    """plan.h: the plans as C tables.

    Args:
        parts: one per kind of processor, the first that fits runs.
        symbols: of each part's kernels, by the plan's names.
        constants: filled with those of all parts.
    """
    names = sorted({name for part in symbols for name in part.values()})
    lines = [
        "enum { ARENA, CONSTANT, INPUT, OUTPUT };",
        f"enum {{ INPUTS = {len(parts[0].plan.inputs)}, OUTPUTS = {len(parts[0].plan.outputs)} }};",
        f"static const uint64_t input_bytes[] = {{{_list(one.bytes for one in parts[0].plan.inputs)}}};",
        f"static const uint64_t output_bytes[] = {{{_list(one.bytes for one in parts[0].plan.outputs)}}};",
        '__attribute__((visibility("hidden"))) extern const unsigned char qcompile_constants[];',
        *(
            f'__attribute__((visibility("hidden"))) int __tvm_ffi_{name}'
            "(void *, const argument *, int32_t, argument *);"
            for name in names
        ),
    ]
    for part, known in zip(parts, symbols, strict=True):
        lines += _tables_of(part, known, constants)
    lines.append(f"static const uint64_t CONSTANT_BYTES = {len(constants.content)};")
    lines.append("static const plan plans[] = {")
    for part in parts:
        lines.append(
            f'    {{"{part.name}", tensors_{part.name}, calls_{part.name}, copies_{part.name}, '
            f"arguments_{part.name}, extents_{part.name}, "
            f"sizeof tensors_{part.name} / sizeof *tensors_{part.name}, {len(part.plan.calls)}, "
            f"{len(part.plan.copies)}, {part.plan.arena}}},"
        )
    most = max((len(call.arguments) for part in parts for call in part.plan.calls), default=1)
    lines += ["};", f"enum {{ MOST_ARGUMENTS = {most} }};", "static int supported(int index) {"]
    lines += [f"    if (index == {i}) return {part.condition};" for i, part in enumerate(parts)]
    lines += ["    return 0;", "}", f'#define SERVED "{", ".join(part.name for part in parts)}"', ""]
    return "\n".join(lines)


def _tables_of(part: Part, symbols: Mapping[str, str], constants: Constants) -> list[str]:
    places: dict[Place, int] = {}
    for call in part.plan.calls:
        for one in call.arguments:
            places.setdefault(one, len(places))
    for one, _ in part.plan.copies:
        places.setdefault(one, len(places))
    copies = [f"{{{places[one]}, {index}}}" for one, index in part.plan.copies]
    extents: list[int] = []
    records: list[str] = []
    calls: list[str] = []
    arguments: list[int] = []
    for place in places:
        dtype = np.dtype(place.dtype)
        position = constants.position(part.plan, place) if place.kind == "constant" else place.position
        records.append(
            f"{{{KINDS[place.kind]}, {CODES[dtype.kind]}, {8 * dtype.itemsize}, {len(place.shape)}, "
            f"{len(extents)}, {position}}}"
        )
        extents += place.shape or (1,)
    for call in part.plan.calls:
        calls.append(f"{{__tvm_ffi_{symbols[call.kernel]}, {len(call.arguments)}, {len(arguments)}}}")
        arguments += [places[one] for one in call.arguments]
    return [
        f"static const int64_t extents_{part.name}[] = {{{_list(extents)}}};",
        f"static const tensor_record tensors_{part.name}[] = {{{_list(records)}}};",
        f"static const uint32_t arguments_{part.name}[] = {{{_list(arguments) or '0'}}};",
        f"static const call_record calls_{part.name}[] = {{{_list(calls) or '{0, 0, 0}'}}};",
        f"static const copy_record copies_{part.name}[] = {{{_list(copies) or '{0, 0}'}}};",
    ]


def _list(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def check_compiler(architecture: Architecture) -> None:
    """Look for the C compiler.

    Raises:
        MissingExtra: if it is not installed; names the Debian package.
    """
    if shutil.which(architecture.compiler) is None:
        raise MissingExtra(
            f"the target {architecture.name} needs the C compiler {architecture.compiler}: "
            f"apt-get install {architecture.package}"
        )


def build(architecture: Architecture, parts: Sequence[Part], folder: Path) -> Constants:
    """Write sources and objects into a folder, link them and the runner.

    Returns:
        Where constants lie in the shared object's block.

    Raises:
        MissingExtra: if the C compiler is not installed.
        LoweringError: if it fails.
    """
    check_compiler(architecture)
    folder.mkdir(parents=True, exist_ok=True)
    for name in DRIVER:
        shutil.copyfile(SOURCES / name, folder / name)
    compiled = [compile_kernels(part.kernels, part.target, folder) for part in parts]
    constants = Constants()
    (folder / "plan.h").write_text(tables(parts, [symbols for symbols, _ in compiled], constants))
    (folder / "constants.bin").write_bytes(constants.content or bytes(ALIGNMENT))
    (folder / "constants.S").write_text(
        ".section .rodata\n.balign 64\n.global qcompile_constants\n.hidden qcompile_constants\n"
        "qcompile_constants:\n"
        '.incbin "constants.bin"\n'
        '.section .note.GNU-stack,"",%progbits\n'
    )
    objects = list(dict.fromkeys(name for _, names in compiled for name in names))
    base = [architecture.compiler, "-O2", "-std=gnu11"]
    shared = [*base, "-shared", "-fPIC", "-fvisibility=hidden", "-o", LIBRARY, "driver.c", "constants.S"]
    _run([*shared, *objects, "-lpthread", "-lm"], folder, architecture)
    _run([*base, "-o", RUNNER, "runner.c", "-L.", "-lmodel", "-Wl,-rpath,$ORIGIN"], folder, architecture)
    return constants


def _run(command: Sequence[str], folder: Path, architecture: Architecture) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        reason = (lines or done.stderr.splitlines() or ["no message"])[0].strip()
        if "No such file" in reason or "cannot find" in reason:
            reason += f" (is the Debian package {architecture.package} installed?)"
        elif ".o" in done.stderr:
            reason += f" (are the files in {cache_folder()} sound?)"
        raise LoweringError(f"{command[0]} failed: {reason}")
