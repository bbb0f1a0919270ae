"""One row times a large matrix of low-bit weights, cold: as in decoding a language model token by token.

    python benchmarks/gemv.py

Weights of 1 to 8 bits with a scale per output channel, or with integer multipliers of it for every 128 inputs
("g128"), and codes of 8 bits as input, against ONNX Runtime's float product and its block kernel for 4 bits
(`MatMulNBits`, blocks of 128, its int8 accumulation). Every call reads another copy of the weights, so that
none lies in a cache; copies lie in huge pages, as constants of a compiled model do. One thread, microseconds,
best and median, alternatives taking turns of two calls, of which the second counts: the first after a pause
takes 0.15 ms more on some processors. Then how far each width is from a line through all of them.
"""

from __future__ import annotations

import argparse
import itertools
import mmap
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import onnxruntime
import torch
from kernels import library
from onnx import TensorProto, helper, numpy_helper
from resnet20 import processor

import qcompile
from qcompile.backends.tvm.families import FAMILIES
from qcompile.backends.tvm.maps import Map
from qcompile.backends.tvm.packing import arrange, multiplier_bytes, runs_of
from qcompile.backends.tvm.specs import ACCUMULATOR, Layer, Output

#: (outputs, inputs)
SHAPES = ((4096, 4096), (11008, 4096))

#: Bytes of all copies together: several times what caches hold.
POOL = 300e6


def copies_of(packed: torch.Tensor) -> list[torch.Tensor]:
    """As many as fit the pool, in huge pages."""
    count, step = int(POOL / packed.numel()) + 1, (packed.numel() + 4095) // 4096 * 4096
    memory = mmap.mmap(-1, count * step, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    copies = [whole[i * step : i * step + packed.numel()] for i in range(count)]
    for one in copies:
        one.copy_(packed)
    return copies


def ours(outputs: int, inputs: int, bits: int, group: int, folder: Path) -> Callable[[], object]:
    """The kernel of one linear layer, its weights another copy in every call; with multipliers of groups."""
    source, target = Map(1, 1, 1, inputs, "uint8"), Map(1, 1, 1, outputs, "uint8")
    runs = runs_of((outputs, inputs, 1, 1), source.padded, (1, 1), 1)
    layer = Layer(
        source, runs, (1, 1), (1, 1), (0, 0), 1, 1, 255, bits, True, 0, 0, False,
        (Output(target, (ACCUMULATOR,), 0, 255),), (), group,
    )  # fmt: skip
    low = 2 ** (bits - 1)
    rng = np.random.default_rng(0)
    codes = rng.integers(-low, low, (outputs, inputs, 1, 1))
    behind = multiplier_bytes(rng.integers(1, 32, (outputs, inputs // group))) if group else None
    family = next(one for one in FAMILIES if one.name == "gemv")
    run, (values, packed, constants) = library(family, layer, arrange(codes, runs, 1), folder, behind)
    copies = itertools.cycle(copies_of(packed))
    return lambda: run.run([values, next(copies), constants])


def theirs(outputs: int, inputs: int, bits: int) -> tuple[Callable[[], object], int]:
    """A session with so many products, float (32) or 4 bits, that their weights do not fit a cache.

    Returns:
        What runs it, and how many products that are.
    """
    rng = np.random.default_rng(0)
    count = int(POOL / (outputs * inputs * bits / 8)) + 1
    nodes, constants, names = [], [], []
    for index in range(count):
        names.append(f"y{index}")
        if bits == 32:
            weight = rng.standard_normal((inputs, outputs), np.float32)
            constants.append(numpy_helper.from_array(weight, f"w{index}"))
            nodes.append(helper.make_node("MatMul", ["x", f"w{index}"], [names[-1]]))
            continue
        blocks = inputs // 128
        stored = rng.integers(0, 256, (outputs, blocks, 64), np.uint8)
        scales = rng.random(outputs * blocks, np.float32)
        constants.append(numpy_helper.from_array(stored, f"w{index}"))
        constants.append(numpy_helper.from_array(scales, f"s{index}"))
        given = {"K": inputs, "N": outputs, "bits": 4, "block_size": 128, "accuracy_level": 4}
        nodes.append(
            helper.make_node(
                "MatMulNBits", ["x", f"w{index}", f"s{index}"], [names[-1]], domain="com.microsoft", **given
            )
        )
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, inputs])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, outputs]) for name in names],
        constants,
    )
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        onnx.save(model, path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = {"x": rng.standard_normal((1, inputs), np.float32)}
    return (lambda: session.run(None, x)), count


def second_calls(runs: int, functions: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of the second of two calls, functions taking turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            function()
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    return times


def main() -> None:
    """Measure both shapes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{processor()}, qcompile {qcompile.__version__}, ONNX Runtime {onnxruntime.__version__}")
    for outputs, inputs in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            alternatives: dict[str, Callable[[], object]] = {}
            products = {}
            for name, bits in (("ONNX Runtime float", 32), ("ONNX Runtime 4 bits", 4)):
                alternatives[name], products[name] = theirs(outputs, inputs, bits)
            for group, bits in itertools.product((0, 128), range(1, 9)):
                name = f"{bits} bits{' g128' if group else ''}"
                path = Path(folder) / f"{bits}_{group}"
                alternatives[name] = ours(outputs, inputs, bits, group, path)
            times = second_calls(options.runs, alternatives)
        each = {name: [one / products.get(name, 1) for one in found] for name, found in times.items()}
        peer = min(each["ONNX Runtime 4 bits"])
        print(f"\n| {outputs} x {inputs} | best us | median us | against ONNX Runtime 4 bits |")
        print("|---|---|---|---|")
        for name, found in each.items():
            print(
                f"| {name} | {1e6 * min(found):.0f} | {1e6 * median(found):.0f} | {min(found) / peer:.2f} |"
            )
        for suffix in ("", " g128"):
            best = np.array([min(each[f"{bits} bits{suffix}"]) for bits in range(1, 9)])
            line = np.polyval(np.polyfit(range(1, 9), best, 1), range(1, 9))
            print(f"from a line{suffix}: " + ", ".join(f"{100 * one:+.0f} %" for one in best / line - 1))


if __name__ == "__main__":
    main()
