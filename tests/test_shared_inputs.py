"""Inputs that all samples share: positions, tables, masks, scalars have no batch, from capture to targets."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from amx import FLAGS
from torch import Tensor, nn
from torch.nn import functional

import qcompile
from qcompile.cli.data import read_inputs, shared_parameters
from qcompile.cli.verify import random_inputs
from qcompile.errors import FileFormatError, InvalidArgument
from qcompile.model import QuantModel
from qcompile.passes.capture import capture

torch.set_num_threads(1)


class Decoder(nn.Module):
    """Tokens that attend to a table, under a mask and from a position that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(16, 8)
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, position: Tensor, x: Tensor, table: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        x = x + self.positions(position)
        scores = self.query(x) @ table.T * scale + mask
        x = x + self.value(torch.softmax(scores, -1) @ table)
        return x + self.down(functional.relu(self.up(x)))


def inputs(batch: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(batch)
    x, table = torch.randn(batch, 3, 8, generator=generator), torch.randn(5, 8, generator=generator)
    mask = torch.randn(3, 5, generator=generator)
    return torch.tensor([batch]), x, table, mask, torch.tensor(0.5)


@pytest.fixture(scope="module")
def model() -> QuantModel:
    torch.manual_seed(0)
    prepared = qcompile.prepare(Decoder(), inputs(2), bits=(2, 4))
    qcompile.calibrate(prepared, [inputs(4), inputs(3)])
    return prepared.eval()


def batched(model: Any) -> list[bool]:
    return [one.is_batched for one in model.signature.inputs]


def test_the_signature_tells_them_apart(model: QuantModel) -> None:
    assert batched(model) == [False, True, False, False, False]
    for bits in (2, 4):
        assert qcompile.verify(model, inputs(5), bits=bits).exact


def test_files_keep_them(model: QuantModel, tmp_path: Path) -> None:
    qcompile.save(model, tmp_path / "model.qcm")
    loaded = qcompile.load(tmp_path / "model.qcm")
    assert batched(loaded) == batched(model)
    with torch.no_grad():
        assert torch.equal(loaded(*inputs(5)), model(*inputs(5)))
    position, x, table, mask, scale = inputs(2)
    with pytest.raises(InvalidArgument, match=r"input 'table' has shape \(2, 8\)"):
        loaded(position, x, table[:2], mask, scale)


def test_compiled_evaluation_keeps_them(model: QuantModel) -> None:
    compiled = torch.compile(model, backend="eager", dynamic=True)
    with torch.no_grad():
        for batch in (2, 5):
            assert torch.equal(compiled(*inputs(batch)), model(*inputs(batch)))


@pytest.mark.parametrize("target", ["onnx-qdq", "onnx-packed"])
def test_onnx_takes_them_at_any_batch(model: QuantModel, target: str) -> None:
    single = qcompile.lower(model, target, bits=4, batch=1)
    assert single.request.input_shapes == ((1,), (1, 3, 8), (5, 8), (3, 5), ())
    explicit = qcompile.lower(model, target, batch=4, input_shapes=((1,), (3, 8), (5, 8), (3, 5), ()))
    assert explicit.request.input_shapes == ((1,), (4, 3, 8), (5, 8), (3, 5), ())
    chunked = qcompile.lower(model, target, bits=4, batch=4, chunk=True)
    with torch.no_grad():
        # the same kernels run on other numbers of rows, and sum in another order
        torch.testing.assert_close(chunked(*inputs(6)), model(*inputs(6)), rtol=0, atol=1e-5)
    for artefact in (target, explicit):
        assert qcompile.verify(model, inputs(8), bits=4, target=artefact).exact


def test_errors_name_the_shared_input(model: QuantModel) -> None:
    run = qcompile.lower(model, "onnx-qdq", batch=2)
    position, x, table, mask, scale = inputs(2)
    with pytest.raises(InvalidArgument, match=r"input .mask. has shape .2, 5. but was captured as \(3, 5\)"):
        run(position, x, table, mask[:2], scale)
    with pytest.raises(InvalidArgument, match="batch 3, the model was lowered for batch 2"):
        run(position, inputs(3)[1], table, mask, scale)


def test_data_files_hold_them(model: QuantModel, tmp_path: Path) -> None:
    names = ["position", "x", "table", "mask", "scale"]
    arrays = dict(zip(names, (one.numpy() for one in inputs(5)), strict=True))
    np.savez(tmp_path / "data.npz", **arrays)
    shared = shared_parameters(model.signature)
    assert shared == {"position", "table", "mask", "scale"}
    found = read_inputs(tmp_path / "data.npz", names, shared)
    assert len(found) == 5
    sizes = {name: list(value.shape) for name, value in found.part(3, 9).items()}
    assert sizes == {"position": [1], "x": [2, 3, 8], "table": [5, 8], "mask": [3, 5], "scale": []}
    np.savez(tmp_path / "none.npz", **{**arrays, "x": arrays["x"][:0]})
    with pytest.raises(FileFormatError, match=r"input 'x' has shape \(0, 3, 8\), expected \(samples"):
        read_inputs(tmp_path / "none.npz", names, shared)
    # before a model is captured, what has another size than the first input is shared
    assert read_inputs(tmp_path / "data.npz", ["x", "mask", "scale"]).shared == {"mask", "scale"}
    assert [tuple(one.shape) for one in random_inputs(model, 7)] == [(1,), (7, 3, 8), (5, 8), (3, 5), ()]


def test_a_model_without_any_batch() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up, self.down = nn.Embedding(5, 4), nn.Linear(4, 6), nn.Linear(6, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, index: Tensor) -> Tensor:
            return self.head(self.down(functional.relu(self.up(self.table(index)[None]))))

    index = torch.tensor(3)
    prepared = qcompile.prepare(Lookup(), index, bits=(4,))
    qcompile.calibrate(prepared, [index])
    assert batched(prepared.eval()) == [False]
    assert qcompile.verify(prepared, index).exact
    assert qcompile.verify(prepared, index, target="onnx-qdq").exact
    run = qcompile.lower(prepared, "onnx-qdq", chunk=True)
    with torch.no_grad():
        torch.testing.assert_close(run(index), prepared(index), rtol=0, atol=1e-6)


# ---- examples of batch 1 ----------------------------------------------------------------------------------


class Positioned(nn.Module):
    """A cache that is written at a position."""

    def forward(self, x: Tensor, cache: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        cache = cache.clone()
        cache[:, position] = x
        return cache.sum(1) + x[:, 0], cache


class Stepped(nn.Module):
    """A vector that holds a number per sample."""

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        return x * torch.sin(step)[:, None]


class Shifted(nn.Module):
    """A vector whose size only its own result has."""

    def forward(self, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        return x.sum(1), offsets + 1


class Gated(nn.Module):
    """A mask of one element, which would fit two or three rows only by accident."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x.reshape(x.shape[0], self.rows, -1) * mask


@pytest.mark.parametrize(
    ("model", "examples", "wanted"),
    [
        (Positioned(), (torch.randn(1, 1, 4), torch.randn(1, 6, 4), torch.tensor([2])), [True, True, False]),
        (Stepped(), (torch.randn(1, 4), torch.tensor([0.5])), [True, True]),
        (Shifted(), (torch.randn(1, 4), torch.tensor([0.5])), [True, False]),
        (Gated(2), (torch.randn(1, 6), torch.rand(1, 1)), [True, False]),  # its size would become 2
        (Gated(3), (torch.randn(1, 6), torch.rand(1, 1)), [True, False]),  # two rows would not fit
    ],
)
def test_an_example_of_batch_one_does_not_make_a_batch_of_everything(
    model: nn.Module, examples: tuple[Tensor, ...], wanted: list[bool]
) -> None:
    captured = capture(model, examples)
    assert batched(captured) == wanted
    more = tuple(
        torch.cat([one, one + 1, one]) if is_batched else one
        for one, is_batched in zip(examples, wanted, strict=True)
    )
    for given in (examples, more):
        expected = model(*given)
        found = captured.signature.restore(captured.graph_module(*captured.signature.bind(given)))
        torch.testing.assert_close(found, expected)


# ---- machine code -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif("avx2" not in FLAGS or shutil.which("gcc") is None, reason="needs AVX2, and gcc")
def test_machine_code_and_its_c_interface_take_them(model: QuantModel, tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    compiled = qcompile.lower(model, "x86", bits=4, batch=2, threads=1, features=("avx2",))
    assert qcompile.verify(model, inputs(4), bits=4, target=compiled).exact
    compiled.export(tmp_path)
    given = inputs(2)
    for index, one in enumerate(given):
        (tmp_path / f"input_{index}.bin").write_bytes(one.numpy().tobytes())
    files = [f"input_{index}.bin" for index in range(len(given))]
    subprocess.run(["./runner", *files, "output_0.bin"], cwd=tmp_path, check=True)
    found = np.fromfile(tmp_path / "output_0.bin", np.float32).reshape(2, 3, 8)
    np.testing.assert_array_equal(found, compiled(*given).numpy())
