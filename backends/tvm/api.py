"""Every name of TVM that this package uses, as TVM 0.27 spells it, and the few idioms that kernels are made
of.

Kernels are Python functions that build TIR statement by statement, closing over sizes. Vectors are explicit:
a load or store of `lanes` consecutive elements, and arithmetic on such values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as builder

__all__ = ["Function", "relax", "tirx", "tvm"]

#: Tells Relax not to fuse a kernel with anything: it has its epilogues already.
OPAQUE = 8

serial, parallel, evaluate = builder.serial, builder.parallel, builder.evaluate
minimum, maximum, select, floor, nearbyint = tirx.min, tirx.max, tirx.Select, tirx.floor, tirx.nearbyint


def llvm(triple: str, attributes: Mapping[str, Any]) -> Any:
    """The target of a platform and a processor."""
    return tvm.target.Target({"kind": "llvm", "mtriple": triple, **attributes})


def processors(triple: str) -> list[str]:
    """LLVM's names of a platform's processors."""
    return [str(one) for one in tvm_ffi.get_global_func("target.llvm_get_cpu_archlist")(llvm(triple, {}))]


def features(triple: str, cpu: str) -> set[str]:
    """LLVM's names of what a processor can do."""
    found = tvm_ffi.get_global_func("target.llvm_get_cpu_features")(llvm(triple, {"mcpu": cpu}))
    return {str(one) for one in found}


#: (shape, dtype) of a tensor.
Tensor = tuple[tuple[int, ...], str]

#: (name, shape, dtype) of an argument of a kernel.
Argument = tuple[str, tuple[int, ...], str]


class Function:
    """A PrimFunc under construction.

    Args:
        name: symbol of the function.
        buffers: (name, shape, dtype) of every argument, inputs first.
    """

    def __init__(self, name: str, buffers: Sequence[Argument]) -> None:
        self._name, self._declared = name, buffers
        self.buffers: dict[str, Any] = {}
        self.result: Any = None

    @contextmanager
    def body(self) -> Iterator[None]:
        """Where statements are added; `result` is the finished PrimFunc afterwards."""
        with IRBuilder() as made, builder.prim_func(s_tir=True):
            builder.func_name(self._name)
            builder.func_attr({"global_symbol": self._name, "tirx.noalias": True, "op_pattern": OPAQUE})
            for name, shape, dtype in self._declared:
                self.buffers[name] = builder.arg(name, builder.buffer(shape, dtype))
            with builder.sblock("root"):  # Relax fuses and plans only functions that have one
                builder.reads()
                builder.writes()
                yield
        self.result = made.get()

    def flat(self, name: str) -> Any:
        """An argument as a one-dimensional buffer."""
        buffer = self.buffers[name]
        size = 1
        for extent in buffer.shape:
            size *= int(extent)
        return builder.decl_buffer((size,), buffer.dtype, data=buffer.data)


def scratch(size: int, dtype: str) -> Any:
    """Memory of one task."""
    return builder.alloc_buffer((size,), dtype, scope="global")


def registers(count: int, lanes: int, dtype: str) -> Any:
    """An array of vectors that stays in registers where every index is a constant.

    TVM puts arrays of this scope on the stack if they have less than 1 KB, and asks for memory for others.
    """
    return builder.alloc_buffer((count * lanes,), dtype, scope="global")


def constant(value: float, dtype: str, lanes: int = 1) -> Any:
    """A number, or a vector of equal ones."""
    scalar = tirx.const(value, dtype)
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def broadcast(value: Any, lanes: int) -> Any:
    """A vector of equal elements."""
    return tirx.Broadcast(value, lanes)


def cast(value: Any, dtype: str, lanes: int = 1) -> Any:
    """Conversion of value."""
    return tirx.Cast(dtype if lanes == 1 else f"{dtype}x{lanes}", value)


def reinterpret(value: Any, dtype: str) -> Any:
    """The same bits as another type."""
    return tirx.call_intrin(dtype, "tirx.reinterpret", value)


def intrinsic(dtype: str, name: str, *arguments: Any) -> Any:
    """An LLVM intrinsic."""
    return tirx.call_llvm_intrin(dtype, name, *arguments)


def fused(value: Any, multiplier: Any, constant: Any, lanes: int) -> Any:
    """value * multiplier + constant of float32 vectors, rounded once."""
    return intrinsic(f"float32x{lanes}", f"llvm.fma.v{lanes}f32", value, multiplier, constant)


def immediate(value: int) -> Any:
    """An operand that an instruction holds."""
    return tirx.const(value, "int8")


def address(buffer: Any, index: Any) -> Any:
    """Pointer to an element."""
    return tirx.address_of(buffer[index])


def part(vector: Any, first: int, lanes: int) -> Any:
    """Consecutive elements of a vector."""
    return tirx.Shuffle([vector], [tirx.const(first + i, "int32") for i in range(lanes)])


def interleave(vectors: Sequence[Any], lanes: int) -> Any:
    """First elements of vectors of `lanes`, second ones, and so on."""
    count = len(vectors)
    order = [tirx.const(i % count * lanes + i // count, "int32") for i in range(count * lanes)]
    return tirx.Shuffle(list(vectors), order)


def indices(first: Any, lanes: int) -> Any:
    """A vector of consecutive numbers."""
    return tirx.Ramp(first, 1, lanes)


def popcount(value: Any) -> Any:
    """Number of bits that are set, element by element."""
    return tirx.popcount(value)


def floordiv(value: Any, divisor: int) -> Any:
    """Quotient of indices, rounded down."""
    return tirx.floordiv(value, divisor)


def load(buffer: Any, index: Any, lanes: int = 1) -> Any:
    """`lanes` elements from `index` on."""
    return buffer[index] if lanes == 1 else buffer[tirx.Ramp(index, 1, lanes)]


def prefetch(buffer: Any, index: Any, cache: int) -> None:
    """Ask for an element's cache line, as far as the first or second cache."""
    hints = [tirx.const(one, "int32") for one in (0, 4 - cache, 1)]  # to read, how near, data
    evaluate(intrinsic("void", "llvm.prefetch.p0", address(buffer, index), *hints))


def store(buffer: Any, value: Any, index: Any, lanes: int = 1) -> None:
    """Write `lanes` elements from `index` on."""
    builder.buffer_store(buffer, value, [index if lanes == 1 else tirx.Ramp(index, 1, lanes)])


def inside(value: Any, extent: int) -> Any:
    """Whether 0 <= value < extent."""
    return tirx.And(value >= 0, value < extent)


def if_then_else(condition: Any, then: Any, otherwise: Any) -> Any:
    """A value; the branch that is not taken is not evaluated."""
    return tirx.if_then_else(condition, then, otherwise)


@contextmanager
def when(condition: Any) -> Iterator[None]:
    """Statements that only run if the condition holds."""
    with builder.If(condition), builder.Then():
        yield


def both(first: Any, second: Any) -> Any:
    """Whether two conditions hold."""
    return tirx.And(first, second)


def either(first: Any, second: Any) -> Any:
    """Whether one of two conditions holds, element by element."""
    return tirx.Or(first, second)


def equal(first: Any, second: Any) -> Any:
    """Whether two values are equal, element by element."""
    return tirx.EQ(first, second)


def differs(first: Any, second: Any) -> Any:
    """Whether two values differ, element by element; a NaN differs from itself."""
    return tirx.NE(first, second)
