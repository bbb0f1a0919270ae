"""The static plan of a compiled model: kernels in order, and where every tensor lies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
        in_place: kernels that write over one of their inputs.
    """

    calls: tuple[Call, ...]
    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...]
    copies: tuple[tuple[Place, int], ...]
    arena: int
    constants: bytes
    in_place: frozenset[str] = frozenset()


def make_plan(module: Any, in_place: Mapping[str, tuple[int, int]]) -> tuple[Plan, dict[str, Any]]:
    """The plan of an optimised Relax module, and its kernels by symbol; for `in_place` see `arranged`."""
    planned = relax.transform.CallTIRRewrite()(module)
    reader = _Reader(planned["main"], in_place)
    kernels = {
        name.name_hint: function.with_attr("global_symbol", name.name_hint)
        for name, function in planned.functions.items()
        if isinstance(function, tvm.tirx.PrimFunc)
    }
    return reader.plan(), kernels


class _Reader:
    def __init__(self, main: Any, in_place: Mapping[str, tuple[int, int]]) -> None:
        self._values: dict[Any, Any] = {}
        self._in_place = in_place
        self._calls: list[Call] = []
        self._tensors = 0
        self._constants = bytearray()
        self._known: dict[Any, Place] = {}
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
        calls = [
            Call(call.kernel, tuple(renamed.get(one, one) for one in call.arguments)) for call in self._calls
        ]
        places, arena, shared = arranged(calls, self._in_place)
        calls = [Call(call.kernel, tuple(places.get(one, one) for one in call.arguments)) for call in calls]
        outputs = tuple(
            Place("output", index, one.shape, one.dtype) for index, one in enumerate(self._results)
        )
        copies = tuple((renamed.get(self._results[i], self._results[i]), i) for i in copied)
        return Plan(tuple(calls), self._inputs, outputs, copies, arena, bytes(self._constants), shared)

    def _bind(self, var: Any, value: Any) -> None:
        if isinstance(value, tvm.ir.Call) or type(value).__name__ == "Call":
            name = getattr(value.op, "name", None)
            if name == "relax.builtin.alloc_tensor":
                shape, dtype = _sizes(value.args[0]), str(value.args[1].value)
                self._values[var] = Place("arena", self._tensors, shape, dtype)  # numbered until it is placed
                self._tensors += 1
            elif name is not None:
                raise LoweringError(f"{name.removeprefix('relax.')} has no machine code; lower to onnx-qdq")
            else:
                arguments = tuple(self._value(one) for one in value.args)
                self._calls.append(Call(value.op.name_hint, arguments))
        else:
            self._values[var] = self._value(value)

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


def arranged(
    calls: Sequence[Call], in_place: Mapping[str, tuple[int, int]]
) -> tuple[dict[Place, Place], int, frozenset[str]]:
    """Where tensors lie that live for some of the calls: the largest first, each as low as it fits.

    Args:
        calls: whose arena places are numbers.
        in_place: by kernel, an input and an output that may be one tensor, as positions among its arguments.

    Returns:
        Final places, bytes of the arena, and the kernels whose two tensors are one.
    """
    lives: dict[Place, list[int]] = {}
    for step, call in enumerate(calls):
        for one in call.arguments:
            if one.kind == "arena":
                lives.setdefault(one, [step, step])[1] = step
    whole: dict[Place, Place] = {one: one for one in lives}  # of each tensor, the first in its memory
    shared: set[str] = set()
    for step, call in enumerate(calls):
        if call.kernel in in_place:
            source, target = (call.arguments[index] for index in in_place[call.kernel])
            dies = source.kind == target.kind == "arena" and lives[source][1] == step == lives[target][0]
            if dies and source.bytes == target.bytes:
                whole[target] = whole[source]
                shared.add(call.kernel)
    blocks: dict[Place, list[int]] = {}
    for one, (first, last) in lives.items():
        block = blocks.setdefault(whole[one], [first, last])
        block[1] = max(block[1], last)
    offsets: dict[Place, int] = {}
    for number, one in enumerate(sorted(blocks, key=lambda one: (-one.bytes, blocks[one]))):
        first, last = blocks[one]
        beside = sorted(
            (offsets[other], other.bytes)
            for other in offsets
            if blocks[other][0] <= last and first <= blocks[other][1]
        )
        # tensors that are read and written together must not lie whole pages apart: processors compare
        # low bits of addresses first, and take a load behind such a store for a load of what is stored
        phase = number * STAGGER % PAGE if one.bytes >= PAGE else None
        offset = _aligned(0, phase)
        for start, size in beside:
            if offset + one.bytes <= start:
                break
            offset = max(offset, _aligned(start + size, phase))
        offsets[one] = offset
    places = {one: Place("arena", offsets[whole[one]], one.shape, one.dtype) for one in lives}
    return places, max((offsets[one] + one.bytes for one in offsets), default=0), frozenset(shared)


def _aligned(offset: int, phase: int | None) -> int:
    """The least offset from here on that suits a tensor."""
    return round_up(offset, ALIGNMENT) if phase is None else offset + (phase - offset) % PAGE


def _sizes(shape: Any) -> tuple[int, ...]:
    return tuple(int(one) for one in shape.values)


def _shape(type_: Any) -> tuple[int, ...]:
    return tuple(int(one) for one in type_.shape)
