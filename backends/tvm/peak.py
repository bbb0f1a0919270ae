"""What a machine does at most: multiply-additions of bytes by its best instruction, and reading memory.

Two kernels that do nothing else, run on as many threads as a model.

multiplications                                                  reading
    codes = one register for every chain                             sums = 0
    for k, as long as it takes                                       for every 64 bytes of a large buffer
        weights = register k mod 64 of a table in the nearest cache      sums += them
        for every chain: sums += dot(its codes, weights)
    store sums

Chains do not wait for each other; there are enough of them to hide an instruction's latency. Sums are
stored, so that no compiler drops any of it, and a test compares them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.backends.target import Peak

from . import api
from .artefact import kernel_artefact
from .library import Library
from .processors import Architecture, Processor

#: Multiply-additions of a run on each thread: milliseconds, and less than int32 sums of small codes hold.
PRODUCTS = 2**29

#: Bytes that are read in a run: several times what caches hold.
BUFFER = 2**28

#: Seconds that either kernel runs for, again and again; the fastest run counts.
SECONDS = 1.0

TABLE = 64  # registers of weights that take turns


@dataclass(frozen=True)
class Instruction:
    """How a kind of processor multiplies bytes fastest.

    Attributes:
        name: of the instruction.
        feature: what the processor must have.
        chains: sums that do not depend on each other.
        size: codes, and weights, of one register; for AMX of one tile.
        lanes: 32-bit lanes of a sum.
        multiply: (sums, int8 codes from 0 on, int8 weights) -> sums; None for AMX.
    """

    name: str
    feature: str
    chains: int
    size: int
    lanes: int
    multiply: Callable[[Any, Any, Any], Any] | None = None


def _vnni(sums: Any, codes: Any, weights: Any) -> Any:
    return api.intrinsic("int32x16", "llvm.x86.avx512.vpdpbusd.512", sums, codes, weights)


def _avx2(sums: Any, codes: Any, weights: Any) -> Any:
    pairs = api.intrinsic("int16x16", "llvm.x86.avx2.pmadd.ub.sw", codes, weights)
    return sums + api.intrinsic("int32x8", "llvm.x86.avx2.pmadd.wd", pairs, api.constant(1, "int16", 16))


def _sdot(sums: Any, codes: Any, weights: Any) -> Any:
    return api.intrinsic("int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8", sums, weights, codes)


def _smull(sums: Any, codes: Any, weights: Any) -> Any:
    for half in (0, 8):
        products = api.intrinsic(
            "int16x8", "llvm.aarch64.neon.smull.v8i16", api.part(codes, half, 8), api.part(weights, half, 8)
        )
        sums = sums + api.intrinsic("int32x4", "llvm.aarch64.neon.saddlp.v4i32.v8i16", products)
    return sums


#: The best first.
INSTRUCTIONS = (
    Instruction("tdpbusd", "amx", 4, 1024, 256),
    Instruction("vpdpbusd", "vnni", 12, 64, 16, _vnni),
    Instruction("vpmaddubsw", "avx2", 4, 32, 8, _avx2),
    Instruction("sdot", "dotprod", 12, 16, 4, _sdot),
    Instruction("smull", "neon", 8, 16, 4, _smull),
)


def instruction_of(processor: Processor) -> Instruction:
    """The best one of a kind of processor."""
    return next(one for one in INSTRUCTIONS if one.feature in processor.features)


@dataclass(frozen=True)
class Measurement:
    """A kernel, what it reads, and the sums that it writes.

    Attributes:
        kernel: PrimFunc.
        inputs: codes and weights, or the buffer; small numbers, so that sums fit int32.
        output: shape of the int32 sums, tasks first.
        work: multiply-additions, or bytes, of all tasks.
    """

    kernel: Any
    inputs: tuple[Tensor, ...]
    output: tuple[int, ...]
    work: float


def multiplications(instruction: Instruction, tasks: int, products: int) -> Measurement:
    """About `products` multiply-additions in every task.

    The sums of a chain add up to those of its codes times the weights of each of its rounds.
    """
    per_product = 16 if instruction.multiply is None else 1  # a row of codes meets 16 columns of weights
    each = instruction.chains * instruction.size * per_product
    rounds = max(1, products // each)
    chains, size, lanes = instruction.chains, instruction.size, instruction.lanes
    sources = 2 if instruction.multiply is None else chains
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4, (sources, size), dtype=torch.int8, generator=generator)
    table = 2 if instruction.multiply is None else TABLE
    weights = torch.randint(-2, 2, (table, size), dtype=torch.int8, generator=generator)
    output = (tasks, chains, lanes)
    function = api.Function(
        "peak_products",
        [
            ("codes", tuple(codes.shape), "int8"),
            ("weights", tuple(weights.shape), "int8"),
            ("sums", output, "int32"),
        ],
    )
    with function.body():
        given, found, sums = (function.flat(name) for name in ("codes", "weights", "sums"))
        with api.parallel(0, tasks) as task:
            start = task * (chains * lanes)
            if instruction.multiply is None:
                _tiles(given, found, sums, start, rounds)
            else:
                _chains(instruction, instruction.multiply, given, found, sums, start, rounds)
    return Measurement(function.result, (codes, weights), output, float(tasks * rounds * each))


def _chains(
    instruction: Instruction,
    multiply: Callable[[Any, Any, Any], Any],
    codes: Any,
    weights: Any,
    sums: Any,
    start: Any,
    rounds: int,
) -> None:
    lanes, size, chains = instruction.lanes, instruction.size, range(instruction.chains)
    registers = api.registers(instruction.chains, lanes, "int32")
    for i in chains:
        api.store(registers, api.constant(0, "int32", lanes), i * lanes, lanes)
    with api.serial(0, rounds) as k:
        weight = api.load(weights, (k & (TABLE - 1)) * size, size)
        for i in chains:
            total = api.load(registers, i * lanes, lanes)
            api.store(registers, multiply(total, api.load(codes, i * size, size), weight), i * lanes, lanes)
    for i in chains:
        api.store(sums, api.load(registers, i * lanes, lanes), start + i * lanes, lanes)


def _tiles(codes: Any, weights: Any, sums: Any, start: Any, rounds: int) -> None:
    """Tile registers: sums in 0-3, codes in 4-5, weights in 6-7, all of 16 rows of 64 bytes."""

    def act(name: str, *arguments: Any) -> None:
        api.evaluate(api.intrinsic("void", f"llvm.x86.{name}", *arguments))

    def move(name: str, register: int, buffer: Any, index: Any) -> None:
        act(name, api.immediate(register), api.address(buffer, index), api.constant(64, "int64"))

    content = [1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8]
    configuration = api.scratch(64, "uint8")
    for index, byte in enumerate(content):
        api.store(configuration, api.constant(byte, "uint8"), index)
    act("ldtilecfg", api.address(configuration, 0))
    for i in range(4):
        act("tilezero", api.immediate(i))
    for i in range(2):
        move("tileloadd64", 4 + i, codes, i * 1024)
        move("tileloadd64", 6 + i, weights, i * 1024)
    with api.serial(0, rounds):
        for i in range(4):
            act("tdpbusd", *map(api.immediate, (i, 4 + i // 2, 6 + i % 2)))
    for i in range(4):
        move("tilestored64", i, sums, start + i * 256)
    act("tilerelease")


def reading(tasks: int, size: int) -> Measurement:
    """Every task adds the int32 of its part of a buffer of about `size` bytes."""
    lanes, vectors = 16, 8
    step = lanes * vectors
    steps = max(1, size // (4 * step * tasks))
    buffer = torch.ones(tasks * steps * step, dtype=torch.int32)  # written, so that it has memory of its own
    output = (tasks, vectors, lanes)
    function = api.Function(
        "peak_reading", [("words", tuple(buffer.shape), "int32"), ("sums", output, "int32")]
    )
    with function.body():
        words, sums = function.flat("words"), function.flat("sums")
        with api.parallel(0, tasks) as task:
            registers = api.registers(vectors, lanes, "int32")
            for i in range(vectors):
                api.store(registers, api.constant(0, "int32", lanes), i * lanes, lanes)
            with api.serial(0, steps) as k:
                for i in range(vectors):
                    word = api.load(words, (task * steps + k) * step + i * lanes, lanes)
                    total = api.load(registers, i * lanes, lanes)
                    api.store(registers, total + word, i * lanes, lanes)
            for i in range(vectors):
                total = api.load(registers, i * lanes, lanes)
                api.store(sums, total, (task * vectors + i) * lanes, lanes)
    return Measurement(function.result, (buffer,), output, float(4 * buffer.numel()))


def opened(
    measurement: Measurement, architecture: Architecture, processor: Processor, threads: int, folder: Path
) -> Library:
    """The kernel alone, as a model of one step."""
    inputs = [(tuple(one.shape), str(one.dtype).removeprefix("torch.")) for one in measurement.inputs]
    outputs = [(measurement.output, "int32")]
    artefact = kernel_artefact(measurement.kernel, inputs, outputs, architecture, processor, folder)
    return Library(artefact, threads)


def measure_peak(architecture: Architecture, processor: Processor, threads: int, folder: Path) -> Peak:
    """Run both kernels on this machine.

    Args:
        architecture, processor: what to compile for; this machine must be such.
        threads: that work at a time.
        folder: for sources and objects.

    Raises:
        LoweringError: if this machine lacks the instructions, or the C compiler fails.
        MissingExtra: if the C compiler is not installed.
    """
    instruction = instruction_of(processor)

    def rate(name: str, measurement: Measurement) -> float:
        library = opened(measurement, architecture, processor, threads, folder / name)
        best, started = float("inf"), time.perf_counter()
        while time.perf_counter() - started < SECONDS:
            best = min([best, *library.kernel_seconds(measurement.inputs, 5)])
        return measurement.work / best

    products = rate("products", multiplications(instruction, threads, PRODUCTS))
    return Peak(instruction.name, products, rate("reading", reading(threads, BUFFER)))
