"""The static plan of a compiled model: kernels in order, and where every tensor lies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompile.errors import LoweringError

from .api import relax, tvm
from .maps import round_up

#: Alignment of every tensor in memory, in bytes: a cache line, and a whole vector.
ALIGNMENT = 64

#: Bytes after which addresses look alike to the order of loads and stores; how far large tensors are apart.
PAGE, STAGGER = 4096, 21 * ALIGNMENT


@dataclass(frozen=True)
class Place:
    """A tensor at run time.

    Attributes:
        kind: `arena`, `constant`, `input` or `output`.
        position: byte offset in the arena or among the constants; index of an input or output.
        shape, dtype: of its elements.
    """

    kind: str
    position: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Size."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Call:
    """One kernel call: its symbol and its tensors, inputs first."""

    kernel: str
    arguments: tuple[Place, ...]


@dataclass(frozen=True)
class Plan:
    """What a driver executes.

    Attributes:
        calls: in order.
        inputs, outputs: the model's.
        copies: (tensor, output) for outputs that no kernel writes: inputs, constants, repetitions.
        arena: bytes of working memory.
        constants: one block of bytes.
    """

    calls: tuple[Call, ...]
    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...]
    copies: tuple[tuple[Place, int], ...]
    arena: int
    constants: bytes


def make_plan(module: Any) -> tuple[Plan, dict[str, Any]]:
    """The plan of an optimised Relax module, and its kernels by symbol."""
    passes = [relax.transform.CallTIRRewrite(), relax.transform.StaticPlanBlockMemory()]
    planned = tvm.transform.Sequential(passes)(module)
    reader = _Reader(planned["main"])
    kernels = {
        name.name_hint: function.with_attr("global_symbol", name.name_hint)
        for name, function in planned.functions.items()
        if isinstance(function, tvm.tirx.PrimFunc)
    }
    return reader.plan(), kernels


class _Reader:
    def __init__(self, main: Any) -> None:
        self._values: dict[Any, Any] = {}
        self._storages: dict[Any, int] = {}
        self._calls: list[Call] = []
        self._arena, self._reserved = 0, 0
        self._constants = bytearray()
        self._known: dict[Any, Place] = {}
        self._outputs: list[Place] = []
        self._inputs = tuple(
            Place("input", index, _shape(one.ty), str(one.ty.dtype)) for index, one in enumerate(main.params)
        )
        self._values.update(zip(main.params, self._inputs, strict=True))
        for block in main.body.blocks:
            for binding in block.bindings:
                self._bind(binding.var, binding.value)
        result = self._value(main.body.body)
        self._results: tuple[Place, ...] = result if isinstance(result, tuple) else (result,)

    def plan(self) -> Plan:
        """The finished plan; outputs get places of their own, kernels write straight to them."""
        renamed: dict[Place, Place] = {}
        copied: list[int] = []
        for index, place in enumerate(self._results):
            if place.kind != "arena" or place in renamed:
                copied.append(index)
            else:
                renamed[place] = Place("output", index, place.shape, place.dtype)
        calls = tuple(
            Call(call.kernel, tuple(renamed.get(one, one) for one in call.arguments)) for call in self._calls
        )
        outputs = tuple(
            Place("output", index, one.shape, one.dtype) for index, one in enumerate(self._results)
        )
        copies = tuple((renamed.get(self._results[i], self._results[i]), i) for i in copied)
        return Plan(calls, self._inputs, outputs, copies, self._arena, bytes(self._constants))

    def _bind(self, var: Any, value: Any) -> None:
        if isinstance(value, tvm.ir.Call) or type(value).__name__ == "Call":
            name = getattr(value.op, "name", None)
            if name == "relax.memory.alloc_storage":
                self._storages[var] = self._reserve(int(value.args[0].values[0]))
            elif name == "relax.memory.alloc_tensor":
                offset = self._storages[value.args[0]] + int(value.args[1].value)
                self._values[var] = Place("arena", offset, _sizes(value.args[2]), str(value.args[3].value))
            elif name == "relax.builtin.alloc_tensor":
                shape, dtype = _sizes(value.args[0]), str(value.args[1].value)
                size = math.prod(shape) * np.dtype(dtype).itemsize
                self._values[var] = Place("arena", self._reserve(size), shape, dtype)
            elif name is not None:
                raise LoweringError(f"{name.removeprefix('relax.')} has no machine code; lower to onnx-qdq")
            else:
                arguments = tuple(self._value(one) for one in value.args)
                self._calls.append(Call(value.op.name_hint, arguments))
        else:
            self._values[var] = self._value(value)

    def _reserve(self, size: int) -> int:
        # tensors that are read and written together must not lie whole pages apart: processors compare
        # low bits of addresses first, and take a load behind such a store for a load of what is stored
        wanted = self._reserved * STAGGER % PAGE if size >= PAGE else self._arena % PAGE
        self._reserved += 1
        offset = self._arena + (wanted - self._arena) % PAGE
        self._arena = offset + round_up(size, ALIGNMENT)
        return offset

    def _value(self, expression: Any) -> Any:
        kind = type(expression).__name__
        if kind == "Tuple":
            return tuple(self._value(one) for one in expression.fields)
        if kind == "TupleGetItem":
            return self._value(expression.tuple_value)[expression.index]
        if kind in ("Constant", "GenericConst"):
            return self._constant(expression)
        return self._values[expression]

    def _constant(self, expression: Any) -> Place:
        if expression not in self._known:
            array: NDArray[Any] = expression.value.numpy()
            offset = len(self._constants)
            self._constants += array.tobytes().ljust(round_up(array.nbytes, ALIGNMENT), b"\0")
            self._known[expression] = Place("constant", offset, tuple(array.shape), str(array.dtype))
        return self._known[expression]


def _sizes(shape: Any) -> tuple[int, ...]:
    return tuple(int(one) for one in shape.values)


def _shape(type_: Any) -> tuple[int, ...]:
    return tuple(int(one) for one in type_.shape)
