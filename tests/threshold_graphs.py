"""Integer graphs with nonuniform quantisers, made from those of prepared models."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

import qcompile
from qcompile.backends.target import LoweringRequest
from qcompile.model import QuantModel
from qcompile.modes import Mode
from qcompile.passes.integer_model import IntegerModel
from qcompile.passes.quantizers import ActivationQuantizer
from qcompile.passes.threshold_op import ALWAYS, NEVER
from qcompile.verify.formulas import VerticalFormulas

Integers = NDArray[np.int64]

#: Replaces the signs and thresholds of one quantiser: (sign, thresholds) -> the same.
Change = Callable[[Integers, Integers], tuple[Integers, Integers]]


def stairs(multiplier: Any, constant: Any, shift: int, low: int, high: int) -> tuple[Integers, Integers]:
    """Signs and thresholds of clip((m a + c) >> shift, low, high), with Python's integers."""
    m, c = np.broadcast_arrays(np.asarray(multiplier, np.int64), np.asarray(constant, np.int64))
    sign = np.where(m < 0, -1, 1)
    levels = np.zeros((high - low, *m.shape), np.int64)
    for index in np.ndindex(m.shape):
        for k in range(high - low):
            wanted = (low + k + 1) * 2**shift - int(c[index])
            slope = abs(int(m[index]))
            first = -(-wanted // slope) if slope else (ALWAYS if wanted <= 0 else NEVER)
            levels[(k, *index)] = min(max(first, ALWAYS), NEVER)
    return sign, levels


def with_thresholds(
    model: IntegerModel, change: Change | None = None, wanted: Callable[[fx.Node], bool] = lambda node: True
) -> list[str]:
    """Replace requantisations of one tensor to codes by thresholds, in place; returns the new nodes' names.

    Args:
        model: an integer graph.
        change: what to do with the thresholds; None keeps the codes as they are.
        wanted: which requantisations.
    """
    made = []
    for node in list(model.graph.nodes):
        if model.operator_name(node) != "requantize" or len(node.args[0]) != 1 or not wanted(node):
            continue
        (x,), (multiplier,), constant, shift, low, high = node.args
        if high - low > 255:
            continue
        sign, levels = stairs(model.constant(multiplier), model.constant(constant), shift, low, high)
        if change is not None:
            sign, levels = change(sign, levels)
        with model.graph.inserting_before(node):
            arguments = []
            for what, value, dtype in (("sign", sign, torch.int8), ("thresholds", levels, torch.int32)):
                name = f"{node.meta['layer']}.{what}"
                _register(model, name, torch.from_numpy(np.array(value)).to(dtype))
                arguments.append(model.graph.get_attr(name))
            new = model.graph.call_function(torch.ops.qcompile.threshold.default, (x, *arguments, low))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        name = node.name
        model.graph.erase_node(node)
        new.name = name  # as it would be called if it had been there from the start
        made.append(name)
    model.graph.eliminate_dead_code()
    model.graph.lint()
    model.recompile()
    return made


def nonuniform(model: QuantModel, change: Change | None = None) -> QuantModel:
    """A copy whose integer graphs hold thresholds wherever they can."""
    model = deepcopy(model)
    convert = model.converted

    def converted(mode: Any, shapes: Any) -> IntegerModel:
        graph = convert(mode, shapes)
        assert with_thresholds(graph, change)
        return graph

    model.converted = converted  # type: ignore[method-assign]
    return model


def request_of_corners(levels: int) -> tuple[LoweringRequest, torch.Tensor]:
    """Thresholds of codes, of wide integers, of sums of windows and of rows; and inputs."""
    rng, x = np.random.default_rng(levels), torch.randn(3, 6, 6, 6)
    ops, graph, constants = torch.ops.qcompile, fx.Graph(), dict[str, torch.Tensor]()

    def call(target: Any, arguments: tuple[Any, ...], name: str, **meta: Any) -> fx.Node:
        node = graph.create_node("call_function", target, arguments, {}, name=name)
        node.meta.update(layer=name, unit=1.0, **meta)
        return node

    def constant(name: str, value: Any, dtype: torch.dtype) -> fx.Node:
        constants[name] = torch.as_tensor(np.asarray(value)).to(dtype)
        return graph.get_attr(name)

    def threshold(source: fx.Node, name: str, shape: tuple[int, ...], reach: int, low: int) -> fx.Node:
        low = low if levels <= 120 else 0  # 8 bits
        sign = constant(f"{name}.sign", rng.choice([-1, 1], shape), torch.int8)
        values = np.sort(rng.integers(-reach, reach, (levels, *shape)), 0)
        return call(
            ops.threshold.default, (source, sign, constant(f"{name}.levels", values, torch.int32), low), name
        )

    given = graph.placeholder("x")
    given.meta = {"dtype": torch.float32}
    codes = call(ops.quantize.default, (given, 0.3, -8, 7), "codes")
    wide = call(ops.quantize.default, (given, 2.0**-20, -(2**28), 2**28), "wide")
    pooled = call(ops.sum_pool.default, (wide, [2, 2], [2, 2], [0, 0]), "pooled")
    flat = call(torch.ops.aten.flatten.using_ints, (codes, 2), "flat")
    weight = constant("rows.weight", rng.integers(-2, 2, (8, 36)), torch.int8)
    meta = {"weight_bits": 2, "weight_signed": True, "code_low": -8, "code_high": 7}
    rows = call(ops.accumulate_linear.default, (flat, weight, 0, 0, 36 * 16), "rows", **meta)
    numbers = (
        constant(name, value, torch.int64) for name, value in (("slope", 699_051), ("offset", 2**20 + 1))
    )
    slope, offset = numbers
    stream = call(ops.requantize.default, ([rows], [slope], offset, 1, -(2**28), 2**28), "stream")
    found = [
        threshold(stream, "of_stream", (8,), 2**24, 0),
        threshold(codes, "of_codes", (6, 1, 1), 8, -2),
        threshold(wide, "of_wide", (), 2**20, 0),
        threshold(wide, "of_wide_channels", (6, 1, 1), 2**20, 1),
        threshold(pooled, "of_sums", (6, 1, 1), 2**21, 0),
        threshold(rows, "of_rows", (8,), 60, 0),
        threshold(rows, "of_rows_again", (), 60, -1),
    ]
    one, none = (constant(name, value, torch.float32) for name, value in (("one", 1.0), ("zero", 0.0)))
    outputs = [call(ops.dequantize.default, (node, one, none), f"output_of_{node.name}") for node in found]
    for node in outputs:
        del node.meta["unit"]
    graph.output(tuple(outputs))
    model = IntegerModel(constants, graph, Mode(2, 4))
    signature = qcompile.prepare(nn.Sequential(*(nn.Conv2d(6, 6, 1) for _ in range(3))), x).signature
    return LoweringRequest(model, signature, (tuple(x.shape),), len(x), threads=1), x


class NonuniformFormulas(VerticalFormulas):
    """Activations are not `step * code` of a uniform grid any more."""

    def activation(self, model: QuantModel, quantizer: ActivationQuantizer, mode: Mode) -> None:
        """No grid."""
        return


def _register(model: IntegerModel, name: str, value: torch.Tensor) -> None:
    owner: Any = model
    *path, last = name.split(".")
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, torch.nn.Module())
        owner = getattr(owner, part)
    owner.register_buffer(last, value)


def scattered(seed: int = 0, spread: int = 40) -> Change:
    """Random nonuniform thresholds around the given ones, some equal, some never reached, random signs."""

    def change(sign: Integers, levels: Integers) -> tuple[Integers, Integers]:
        rng = np.random.default_rng([seed, abs(int(levels.sum()))])  # equal for equal graphs
        moved = levels + rng.integers(-spread, spread + 1, levels.shape)
        moved = np.sort(np.clip(moved, ALWAYS, NEVER), 0)
        if len(moved) > 2:
            moved[1] = moved[0]
        flips = rng.choice([-1, 1], sign.shape)
        # a flipped staircase about the same place
        moved = np.where(flips < 0, -moved[::-1], moved)
        return sign * flips, np.clip(moved, ALWAYS, NEVER)

    return change
