"""What a device needs: shared object, header, example, CMake file, and a page that explains them."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from pathlib import Path

import qcompile.version
from qcompile.backends.target import LoweringRequest
from qcompile.errors import FileAccessError, InvalidInputType

from .artefact import Artefact
from .build import LIBRARY, RUNNER
from .plan import Place

_CTYPES = {
    "float32": "float",
    "float64": "double",
    "int64": "int64_t",
    "int32": "int32_t",
    "int16": "int16_t",
    "int8": "int8_t",
    "uint16": "uint16_t",
    "uint8": "uint8_t",
    "bool": "uint8_t",
    "float16": "uint16_t",  # C has no such type: the bits
}

_README = """# A compiled model

Mode {mode}, for {platform} (the best of these is chosen when it starts: {processors}), glibc
and POSIX threads; nothing else is needed. Written by qcompile {version}.

Shapes are fixed, tensors contiguous and aligned to 64 bytes:

| | index | name | type | shape |
| --- | --- | --- | --- | --- |
{table}

Working memory: {arena} bytes per model, besides what kernels allocate while they run.

The runner reads the inputs' raw bytes from files and writes those of the outputs; with `-r 100` it prints the
time of a run, with `-t 2` it uses two threads:

    ./runner {inputs} {outputs}

The example is a starting point for a program of your own: it reads the same files and prints the outputs.
With a compiler for the device ({compiler}; on the device itself, gcc):

    {compiler} -O2 example.c -L. -lmodel -Wl,-rpath,'$ORIGIN' -o example
    {run}./example {inputs}

or with CMake:

    cmake -B build -DCMAKE_C_COMPILER={compiler} && cmake --build build
{emulation}
Functions have the same names in every model: a program that uses several opens them with `dlopen`, one handle
per model, and does not link them.

Files: `libmodel.so` the model, `model.h` its interface, `runner` and `runner.c`, `example.c`,
`CMakeLists.txt`.
"""

_EMULATION = """
On a machine of another kind, programs run under emulation (Debian package {package}), slowly:
`{run}./runner ...`.
"""

_CMAKE = """cmake_minimum_required(VERSION 3.10)
project(model C)
add_library(model SHARED IMPORTED)
set_target_properties(model PROPERTIES
    IMPORTED_LOCATION ${CMAKE_CURRENT_SOURCE_DIR}/libmodel.so IMPORTED_NO_SONAME ON)
foreach(program example runner)
    add_executable(${program} ${program}.c)
    target_link_libraries(${program} model)
endforeach()
"""


def example(inputs: tuple[Place, ...], outputs: tuple[Place, ...]) -> str:
    """A C program that runs the model on files."""
    kind = {place: _CTYPES.get(place.dtype, "uint8_t") for place in outputs}
    usage = " ".join(f"input_{index}.bin" for index in range(len(inputs)))
    lines = [
        "#include <stdint.h>",
        "#include <stdio.h>",
        "#include <stdlib.h>",
        "",
        '#include "model.h"',
        "",
        "int main(int count, char **names) {",
        f"    static const size_t input_bytes[] = {{{', '.join(str(one.bytes) for one in inputs)}}};",
        f"    static const size_t output_bytes[] = {{{', '.join(str(one.bytes) for one in outputs)}}};",
        f"    void *inputs[{len(inputs)}], *outputs[{len(outputs)}];",
        f"    if (count != {len(inputs) + 1}) {{",
        f'        fprintf(stderr, "usage: %s {usage}\\n", names[0]);',
        "        return 2;",
        "    }",
        f"    for (int i = 0; i < {len(inputs)}; i++) {{",
        "        inputs[i] = aligned_alloc(64, (input_bytes[i] + 63) / 64 * 64);",
        '        FILE *file = fopen(names[i + 1], "rb");',
        "        if (file == NULL || fread(inputs[i], 1, input_bytes[i], file) != input_bytes[i]) {",
        '            fprintf(stderr, "%s: cannot read %zu bytes\\n", names[i + 1], input_bytes[i]);',
        "            return 2;",
        "        }",
        "        fclose(file);",
        "    }",
        f"    for (int i = 0; i < {len(outputs)}; i++)",
        "        outputs[i] = aligned_alloc(64, (output_bytes[i] + 63) / 64 * 64);",
        "    qcompile_model *model = qcompile_create(1);",
        "    if (model == NULL || qcompile_run(model, (const void *const *)inputs, outputs)) {",
        '        fprintf(stderr, "%s\\n", qcompile_error());',
        "        return 1;",
        "    }",
    ]
    for index, place in enumerate(outputs):
        size, real = place.bytes // max(1, _size(place.dtype)), place.dtype in ("float32", "float64")
        shown = '"%.9g\\n", (double)' if real else '"%lld\\n", (long long)'
        lines.append(
            f"    for (size_t i = 0; i < {size}; i++) printf({shown}(({kind[place]} *)outputs[{index}])[i]);"
        )
    return "\n".join([*lines, "    qcompile_destroy(model);", "    return 0;", "}", ""])


def _size(dtype: str) -> int:
    return Place("", 0, (1,), dtype).bytes


def export(artefact: Artefact, request: LoweringRequest, folder: str | Path) -> tuple[Path, ...]:
    """Write everything, or nothing.

    Raises:
        FileAccessError: if the folder or a file cannot be written.
        InvalidInputType: if `folder` is no path.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise InvalidInputType(f"folder must be a path, not {type(folder).__name__}")
    first, target, architecture = artefact.first.plan, Path(folder), artefact.architecture
    foreign = architecture.emulator and platform.machine() not in architecture.machine
    emulated = f"{architecture.emulator} -L {architecture.sysroot} " if foreign else ""
    names = [one.name for one in request.signature.inputs] + [""] * len(first.outputs)
    rows = [
        f"| {place.kind} | {place.position} | {name} | {place.dtype} | {list(place.shape)} |"
        for place, name in zip((*first.inputs, *first.outputs), names, strict=True)
    ]
    page = _README.format(
        mode=request.model.mode.name,
        version=qcompile.version.__version__,
        platform=artefact.architecture.triple,
        processors=", ".join(artefact.variants),
        table="\n".join(rows),
        arena=max(one.plan.arena for one in artefact.variants.values()),
        compiler=architecture.compiler,
        run=emulated,
        emulation=_EMULATION.format(run=emulated, package=architecture.emulator_package) if emulated else "",
        inputs=" ".join(f"input_{place.position}.bin" for place in first.inputs),
        outputs=" ".join(f"output_{place.position}.bin" for place in first.outputs),
    )
    contents = {
        "README.md": page,
        "CMakeLists.txt": _CMAKE,
        "example.c": example(first.inputs, first.outputs),
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".") as made:
            for name, content in contents.items():
                (Path(made) / name).write_text(content)
            for name in ("model.h", "runner.c", RUNNER, LIBRARY):
                shutil.copy(artefact.folder / name, Path(made) / name)
            names = sorted(os.listdir(made))
            for name in names:
                if (target / name).is_dir():
                    raise IsADirectoryError(f"{name} is a folder")
            for name in names:
                os.replace(Path(made) / name, target / name)
    except OSError as cause:
        raise FileAccessError(f"cannot write to {target}: {cause.strerror or cause}") from cause
    return tuple(target / name for name in names)
