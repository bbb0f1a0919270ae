"""What each family of kernels reaches on this processor, layer by layer: the rates that the registry goes by.

    python benchmarks/kernels.py

Billions of multiply-additions per second on one thread, best of many runs, families taking turns.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from resnet20 import processor as machine

from qcompile.backends.tvm.artefact import kernel_artefact
from qcompile.backends.tvm.families import FAMILIES, Family
from qcompile.backends.tvm.library import Library
from qcompile.backends.tvm.maps import Map
from qcompile.backends.tvm.packing import arrange, runs_of
from qcompile.backends.tvm.processors import X86, Processor
from qcompile.backends.tvm.specs import ACCUMULATOR, Layer, Output
from qcompile.errors import LoweringError
from qcompile.timing import best_of

#: Feature of a family, LLVM's name of a processor that has it, C condition.
PROCESSORS = {
    "amx": ("sapphirerapids", "has_tiles()"),
    "bitalg": ("icelake-server", '__builtin_cpu_supports("avx512bitalg")'),
    "vnni": ("cascadelake", '__builtin_cpu_supports("avx512vnni")'),
    "avx512": ("cascadelake", '__builtin_cpu_supports("avx512bw")'),
    "avx2": ("haswell", '__builtin_cpu_supports("avx2")'),
}

#: (inputs, outputs, height, width, kernel, groups); linear layers have a height of 1.
LAYERS = (
    (64, 64, 56, 56, 3, 1),
    (128, 128, 28, 28, 3, 1),
    (256, 256, 14, 14, 3, 1),
    (512, 512, 7, 7, 3, 1),
    (256, 256, 14, 14, 1, 1),
    (192, 192, 28, 28, 3, 192),
    (4096, 4096, 1, 1, 1, 1),
    (4096, 4096, 1, 4, 1, 1),
    (4096, 4096, 1, 16, 1, 1),
)


def layer_of(shape: tuple[int, int, int, int, int, int], bits: int) -> tuple[Layer, np.ndarray]:
    """A layer with an epilogue to codes of as many bits, and its weight codes."""
    inputs, outputs, height, width, kernel, groups = shape
    edge = kernel // 2
    source = Map(1, height, width, inputs, "uint8", 0, (edge,) * 4)
    target = Map(1, height, width, outputs, "uint8", 0, (edge,) * 4)
    weights = (outputs, inputs // groups, kernel, kernel)
    runs = runs_of(weights, source.padded, (1, 1), groups)
    layer = Layer(
        source, runs, (1, 1), (1, 1), (edge,) * 2, target.h, target.w, 2**bits - 1, bits, True, 0, 0,
        groups > 1,
        (Output(target, (ACCUMULATOR,), 0, 2**bits - 1),), (),
    )  # fmt: skip
    low = 2 ** (bits - 1)
    return layer, arrange(np.random.default_rng(0).integers(-low, low, weights), runs, groups)


def library(
    family: Family, layer: Layer, vectors: np.ndarray, folder: Path, multipliers: np.ndarray | None = None
) -> tuple[Library, list[torch.Tensor]]:
    """A model of one layer, and its inputs: codes, packed weights with bytes of multipliers, constants."""
    cpu, condition = PROCESSORS[min(family.needs)]
    output = layer.outputs[0]
    codes = torch.randint(0, layer.highest + 1, layer.source.shape, dtype=torch.uint8)
    constants = torch.full(output.constants, 2.0**-8, dtype=torch.float64)
    packed = family.pack(vectors, layer)
    packed = packed if multipliers is None else np.concatenate([packed, multipliers])
    given = [codes, torch.from_numpy(packed).clone(), constants]
    tensors = [(tuple(one.shape), str(one.dtype).removeprefix("torch.")) for one in given]
    processor = Processor("here", {"mcpu": cpu}, family.needs, condition)
    kernel = family.build("layer", layer)
    artefact = kernel_artefact(kernel, tensors, [(output.map.shape, "uint8")], X86, processor, folder)
    return Library(artefact, 1), given


def main() -> None:
    """Measure every family that this processor can run, at 1, 2, 4 and 8 bits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    options = parser.parse_args()
    print(machine())
    for shape in LAYERS:
        for bits in (1, 2, 4, 8):
            layer, vectors = layer_of(shape, bits)
            products = layer.h * layer.w * shape[1] * shape[0] // shape[5] * shape[4] ** 2
            with tempfile.TemporaryDirectory() as folder:
                alternatives = {}
                for index, family in enumerate(FAMILIES):
                    feature = min(family.needs)
                    skipped = family.time(layer) is None or (family.name == "bit-serial" and bits > 4)
                    if feature not in PROCESSORS or skipped:
                        continue
                    run, given = library(family, layer, vectors, Path(folder) / str(index))
                    try:
                        run.variant()
                    except LoweringError:
                        continue
                    alternatives[f"{family.name} ({feature})"] = lambda run=run, given=given: run.run(given)
                times = best_of(options.runs, alternatives)
            found = ", ".join(f"{name} {products / seconds / 1e9:.0f}" for name, seconds in times.items())
            print(f"{'x'.join(map(str, shape))} w{bits}a{bits}: {found}")


if __name__ == "__main__":
    main()
