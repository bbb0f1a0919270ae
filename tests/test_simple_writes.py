"""Writes in the form that targets get: the values of torch's own operators, alone and in whole models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from amx import FLAGS
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from onnx_networks import Function, lowered
from torch import Tensor, fx, nn

import qcompile
from qcompile.backends.simple_writes import with_simple_writes
from qcompile.modes import Mode
from qcompile.passes.integer_model import IntegerModel

torch.set_num_threads(1)
aten = torch.ops.aten

#: What targets have; everything else about a write must be said with these.
SIMPLE = {"cat", "slice", "where", "scatter", "scatter_add"} | {"reshape", "expand", "to"}
SIMPLE |= {"remainder", "add", "mul"}


def simplified(target: Any, args: tuple[Any, ...], in_range: bool) -> tuple[Tensor, set[str]]:
    """What a graph of one operator gives in its simple form, and the operators of that form."""
    graph, tensors = fx.Graph(), []

    def placed(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [placed(one) for one in value]
        if not isinstance(value, Tensor):
            return value
        tensors.append(value)
        node = graph.placeholder(f"x{len(tensors)}")
        node.meta["dtype"] = value.dtype
        return node

    graph.output((graph.call_function(target, tuple(placed(one) for one in args)),))
    model = IntegerModel({}, graph, Mode(4, 4))
    made = with_simple_writes(model, tuple(tuple(one.shape) for one in tensors), in_range)
    used = {made.operator_name(node).removeprefix("aten.") for node in made.graph.nodes}
    return made(*tensors)[0], used - {""}


@st.composite
def writes(draw: st.DrawFn) -> tuple[Any, tuple[Any, ...]]:
    """An operator that writes, and its arguments."""
    shape = draw(st.lists(st.integers(2, 4), min_size=2, max_size=4))
    base, axis = torch.randn(shape), draw(st.integers(-len(shape), len(shape) - 1))
    size = shape[axis]

    def indices(wanted: list[int], below: int, low: int = 0) -> Tensor:
        count = torch.Size(wanted).numel()
        listed = draw(st.lists(st.integers(low, below - 1), min_size=count, max_size=count))
        dtype = draw(st.sampled_from([torch.int64, torch.int32]))
        return torch.tensor(listed, dtype=dtype).reshape(wanted)

    kind = draw(
        st.sampled_from(["slice", "select", "diagonal", "put", "mask", "copy", "add", "fill", "scatter"])
    )
    if kind == "slice":
        bounds = [draw(st.integers(-size - 1, size + 1)) for _ in range(2)]
        part = (axis, *bounds, draw(st.integers(1, 3)))
        return aten.slice_scatter.default, (base, torch.randn_like(aten.slice(base, *part)), *part)
    if kind == "select":
        part = (axis, draw(st.integers(-size, size - 1)))
        return aten.select_scatter.default, (base, torch.randn_like(base.select(*part)), *part)
    if kind == "diagonal":
        part = (draw(st.integers(-1, 1)), axis, axis - 1 if axis > -len(shape) else axis + 1)
        return aten.diagonal_scatter.default, (base, torch.randn_like(base.diagonal(*part)), *part)
    if kind == "put":
        common = draw(st.sampled_from([[], [1], [3], [2, 3]]))
        listed = [
            indices(draw(st.sampled_from([common, common[-1:]])), one, -one) if draw(st.booleans()) else None
            for one in shape
        ]
        if all(one is None for one in listed):
            listed[-1] = indices(common, shape[-1], -shape[-1])
        accumulate = draw(st.booleans())
        places = base.clone()[tuple(slice(None) if one is None else one.long() for one in listed)]
        values = torch.randn_like(places) if accumulate else torch.randn(())  # one place may be written twice
        return aten.index_put.default, (base, listed, values, accumulate)
    if kind == "mask":
        dims = draw(st.integers(1, len(shape)))
        return aten.index_put.default, (base, [torch.randn(shape[:dims]) > 0], torch.randn(()))
    if kind == "scatter":
        part = [draw(st.integers(1, one)) for one in shape]
        index = indices(part, size).long()
        source = torch.randn([one + draw(st.integers(0, 1)) for one in part])
        return aten.scatter_add.default, (base, axis, index, source)
    index = torch.randperm(size)[: draw(st.integers(1, size))]
    source = torch.randn_like(base.index_select(axis, index))
    if kind == "fill":
        return aten.index_fill.int_Scalar, (base, axis, index, 1.5)
    return {"copy": aten.index_copy, "add": aten.index_add}[kind].default, (base, axis, index, source)


@settings(max_examples=300, deadline=None)
@given(writes())
def test_simple_writes_give_what_torch_gives(write: tuple[Any, tuple[Any, ...]]) -> None:
    target, args = write
    found, used = simplified(target, args, in_range=True)
    torch.testing.assert_close(found, target(*args), rtol=0, atol=1e-6)  # sums in another order
    assert used <= SIMPLE


def test_indices_stay_as_they_are_where_the_target_checks_them() -> None:
    args = torch.randn(3, 4), [None, torch.tensor([3, 1])], torch.randn(3, 2)
    for in_range in (True, False):
        found, used = simplified(aten.index_put.default, args, in_range)
        assert torch.equal(found, aten.index_put.default(*args))
        assert ("remainder" in used) == in_range


# ---- in models --------------------------------------------------------------------------------------------


def _assigned(x: Tensor, index: Any, value: Callable[[Tensor], Any]) -> Tensor:
    y = torch.tanh(x)
    y[index] = value(x)
    return y


def _all_at_once(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], 8)
    y[:, 0] = x[:, 0]
    y[:, 1:6:2] = torch.tanh(x[:, :3])
    y[:, torch.tensor([-1, 4])] = x[:, 2:4]
    y[y > 0.5] = 0.25
    y = y.index_add(1, torch.tensor([0, 0]), x[:, :2], alpha=2)
    y = y.masked_fill(y < -0.5, -1.0).scatter(1, (x[:, :3] > 0).to(torch.int64), x)
    return torch.where(torch.logical_not((y == 0) | (y >= 2)), y, torch.full_like(y, 3.0))


ISLANDS: dict[str, Callable[[Tensor], Tensor]] = {
    "select": lambda x: _assigned(x, (slice(None), 0), lambda x: x[:, 1]),
    "slice": lambda x: _assigned(x, (Ellipsis, slice(1, None, 3)), lambda x: 0.5),
    "places": lambda x: _assigned(x, (slice(None), torch.tensor([3, -2])), lambda x: x[:, :2]),
    "mask": lambda x: _assigned(x, x > 0.1, lambda x: 0.5),
    "all at once": _all_at_once,
}


def prepared(function: Callable[[Tensor], Tensor]) -> tuple[nn.Module, Tensor]:
    """A network around a function of eight features, and inputs for it."""
    torch.manual_seed(0)
    layers = [
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        Function(function),
        nn.Linear(8, 8),
        nn.Linear(8, 3),
    ]
    x = torch.randn(4, 8)
    model = qcompile.prepare(nn.Sequential(*layers), (x,), bits=(2, 4))
    qcompile.calibrate(model, [x])
    return model.eval(), x


@pytest.mark.parametrize("name", ISLANDS)
def test_onnx_and_files_write_what_torch_writes(
    name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = prepared(ISLANDS[name])
    monkeypatch.setattr(torch.onnx, "export", None)  # no operator needs torch's exporter
    qcompile.save(model, tmp_path / "model.qcm")
    loaded = qcompile.load(tmp_path / "model.qcm")
    for bits in (2, 4):
        with torch.no_grad():
            expected = qcompile.at(model, bits)(x)
        assert qcompile.verify(model, x, bits=bits).exact
        assert torch.equal(qcompile.at(loaded, bits)(x), expected)
        compiled = lowered(loaded, bits, batch=4)
        assert qcompile.verify(loaded, x, bits=bits, target=compiled).exact
        (found,) = ReferenceEvaluator(compiled.model).run(
            None, {compiled.model.graph.input[0].name: x.numpy()}
        )
        # two evaluators round tanh and float layers differently
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif("avx2" not in FLAGS or shutil.which("gcc") is None, reason="needs AVX2, and gcc")
@pytest.mark.parametrize("name", ISLANDS)
def test_machine_code_writes_what_torch_writes(name: str) -> None:
    pytest.importorskip("tvm")
    model, x = prepared(ISLANDS[name])
    compiled = qcompile.lower(model, "x86", bits=2, batch=4, threads=1, features=("avx2",))
    report = qcompile.verify(model, x, bits=2, target=compiled)
    assert report.exact, report
