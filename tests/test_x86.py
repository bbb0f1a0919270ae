"""The target x86: exact, without TVM or Python on the device, from several threads, and mutants are found."""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from amx import FLAGS, run_amx_kernels
from torch import nn
from verify_networks import Gate, Residual, images, trained

import qcompile
from qcompile.errors import FileAccessError, InvalidArgument, LoweringError, MissingExtra
from qcompile.model import QuantModel
from qcompile.verify import verify

pytest.importorskip("tvm")
pytestmark = pytest.mark.skipif(
    "avx2" not in FLAGS or shutil.which("gcc") is None, reason="needs a processor with AVX2, and gcc"
)

from qcompile.backends.tvm import objects  # noqa: E402
from qcompile.backends.tvm.library import Library  # noqa: E402

NETWORKS: dict[str, tuple[type[nn.Module], torch.Tensor]] = {
    "residual": (Residual, images()),
    "gate": (Gate, images(6, 8)),
}


@pytest.mark.parametrize("name", ["residual", pytest.param("gate", marks=pytest.mark.slow)])
def test_networks_are_exact(name: str) -> None:
    kind, x = NETWORKS[name]
    report = verify(trained(kind, x), x, bits=2, target="x86")
    assert report.failures == ()
    assert report.exact


@pytest.mark.parametrize(
    "kind", ["amx", "avx2", *(pytest.param(one, marks=pytest.mark.slow) for one in ("bitalg", "vnni"))]
)
def test_every_kind_of_processor_is_exact(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {"avx2": "avx2", "bitalg": "avx512_bitalg"}.get(kind, "avx512_vnni")
    if needed not in FLAGS:
        pytest.skip(f"this processor has no {needed}")
    emulator = run_amx_kernels(monkeypatch) if kind == "amx" else None
    model = trained(Residual, images())
    before = emulator.amx_instructions() if emulator else 0
    compiled = qcompile.lower(model, "x86", bits=4, batch=len(images()), threads=1, features=(kind,))
    assert verify(model, images(), target=compiled).failures == ()
    family = {"bitalg": "vnni"}.get(kind, kind)
    assert any(family in one["kernel"] for one in compiled.kernels())
    assert emulator is None or emulator.amx_instructions() > before + 1000


@pytest.fixture(scope="module")
def model() -> QuantModel:
    return trained(Residual, images())


@pytest.fixture(scope="module")
def compiled(model: QuantModel) -> Any:
    return qcompile.lower(model, "x86", bits=2, batch=len(images()), threads=1)


def test_calls_return_what_the_float_model_returns(model: QuantModel, compiled: Any) -> None:
    x = images()
    expected = qcompile.at(model, 2)(x)
    assert torch.allclose(compiled(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    strided = torch.empty(*x.shape[:3], 2 * x.shape[3])[..., ::2].copy_(x)
    shifted = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    assert torch.equal(compiled(strided), compiled(x))
    assert torch.equal(compiled(shifted), compiled(x))


def test_several_threads_may_call_and_kernels_may_use_several(model: QuantModel, compiled: Any) -> None:
    inputs = [images() * (1 + 0.1 * i) for i in range(8)]
    expected = [compiled(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(pool.map(compiled, inputs), expected, strict=True))
    parallel = qcompile.lower(model, "x86", bits=2, batch=len(images()), threads=3)
    assert all(torch.equal(parallel(x), y) for x, y in zip(inputs, expected, strict=True))


def test_other_shapes_are_one_line(compiled: Any) -> None:
    with pytest.raises(InvalidArgument, match="batch=2"):
        compiled(images(2))


def test_chunks_take_any_batch(model: QuantModel, compiled: Any) -> None:
    chunked = qcompile.lower(model, "x86", bits=2, batch=4, threads=1, chunk=True)
    x = torch.cat([images(), images() * 0.5])[:9]
    whole = qcompile.lower(model, "x86", bits=2, batch=9, threads=1)
    assert torch.equal(chunked(x), whole(x))
    assert chunked(x[:3]).shape[0] == 3
    with pytest.raises(InvalidArgument, match="chunk=True"):
        whole(x[:3])


def test_models_that_lack_the_instructions_say_so(model: QuantModel) -> None:
    if "amx_int8" in FLAGS:
        pytest.skip("this processor has every instruction")
    run = qcompile.lower(model, "x86", bits=2, batch=len(images()), features=("amx",))
    with pytest.raises(LoweringError, match="compiled for amx, which this processor lacks"):
        run(images())


def test_compiled_kernels_are_kept(
    model: QuantModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "cache"))
    first = qcompile.lower(model, "x86", bits=2, features=("avx2",), threads=1)
    kept = {one.name: one.stat().st_ino for one in (tmp_path / "cache").iterdir()}
    assert kept
    assert all(name.endswith((".o", ".checked")) for name in kept)
    second = qcompile.lower(model, "x86", bits=2, features=("avx2",), threads=1)
    assert {one.name: one.stat().st_ino for one in (tmp_path / "cache").iterdir()} == kept
    assert torch.equal(first(images(1)), second(images(1)))
    monkeypatch.setattr(objects, "LIMIT", 30_000)
    qcompile.lower(model, "x86", bits=3, features=("avx2",), threads=1)
    assert sum(one.stat().st_size for one in (tmp_path / "cache").iterdir()) <= 30_000
    monkeypatch.setenv("QCOMPILE_CACHE", "/proc/nowhere")
    assert torch.equal(qcompile.lower(model, "x86", bits=2, features=("avx2",))(images(1)), first(images(1)))


def test_a_missing_compiler_is_named(model: QuantModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MissingExtra, match="apt-get install gcc"):
        qcompile.lower(model, "x86", bits=2)


def test_layers_without_a_kernel_are_named() -> None:
    net = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Conv3d(4, 4, 3), nn.ReLU(), nn.Conv3d(4, 2, 3))
    x = torch.randn(2, 1, 9, 9, 9)
    prepared = qcompile.prepare(net, x)
    qcompile.calibrate(prepared, [x])
    with pytest.raises(LoweringError, match="layer '2"):
        qcompile.lower(prepared.eval(), "x86", bits=2)


def test_float_operators_that_tvm_cannot_import_are_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.special.bessel_j0(self.body(self.stem(x).relu())))

    x = torch.randn(2, 4)
    prepared = qcompile.prepare(Odd(), x)
    qcompile.calibrate(prepared, [x])
    with pytest.raises(LoweringError, match=r"layer 'special_bessel_j0'.*onnx-qdq"):
        qcompile.lower(prepared.eval(), "x86", bits=2)


def test_the_exported_folder_runs_without_python(compiled: Any, tmp_path: Path) -> None:
    written = compiled.export(tmp_path / "build")
    assert sorted(path.name for path in written) == [
        "CMakeLists.txt", "README.md", "example.c", "libmodel.so", "model.h", "runner", "runner.c",
    ]  # fmt: skip
    x = images()
    (tmp_path / "build" / "input_0.bin").write_bytes(x.numpy().tobytes())
    environment = {"PATH": os.environ["PATH"]}
    page = (tmp_path / "build" / "README.md").read_text()
    commands = [line.strip() for line in page.splitlines() if line.startswith(("    gcc", "    ./example"))]
    done = subprocess.run(
        ["sh", "-c", " && ".join(commands)],
        cwd=tmp_path / "build",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found = np.array([float(line) for line in done.stdout.split()], np.float32)
    np.testing.assert_array_equal(found, compiled(x).numpy().reshape(-1))
    linked = subprocess.run(
        ["ldd", "libmodel.so"], cwd=tmp_path / "build", capture_output=True, text=True, check=True
    ).stdout
    assert "tvm" not in linked
    assert "python" not in linked


def test_an_export_that_fails_leaves_nothing(compiled: Any, tmp_path: Path) -> None:
    (tmp_path / "build" / "model.h").mkdir(parents=True)
    with pytest.raises(FileAccessError, match=r"model\.h"):
        compiled.export(tmp_path / "build")
    assert [one.name for one in (tmp_path / "build").iterdir()] == ["model.h"]


def mutant(compiled: Any, kernel: str, argument: str, folder: Path) -> tuple[Any, str]:
    """The artefact with one bit of a constant changed, one that is no padding, and that constant's name."""
    name = next(one for one in compiled.constants() if one.startswith(kernel) and one.endswith(argument))
    array = compiled.constants()[name]
    original = compiled.artefact.library.read_bytes()
    place = original.find(array.tobytes())
    assert original.count(array.tobytes()) == 1
    broken = object.__new__(type(compiled))
    broken.__dict__.update(compiled.__dict__)
    for index in range(0, array.size, array.size // 50 | 1):
        content = bytearray(original)
        at = place + index * array.itemsize
        content[at + array.itemsize - 1] ^= 1  # of floats the exponent
        changed = folder / f"{index}"
        changed.mkdir()
        (changed / "libmodel.so").write_bytes(content)
        broken.library = Library(dataclasses.replace(compiled.artefact, folder=changed), 1)
        if not torch.equal(broken(images()), compiled(images())):
            return broken, name
    raise AssertionError("no change shows")


@pytest.mark.parametrize(
    ("kernel", "argument"),
    [
        ("block1.conv1/", "_1"),
        pytest.param("block1.conv1/", "_2", marks=pytest.mark.slow),
        pytest.param("stem/", "_1", marks=pytest.mark.slow),
    ],
)
def test_a_changed_number_is_found(
    model: QuantModel, compiled: Any, kernel: str, argument: str, tmp_path: Path, monkeypatch: Any
) -> None:
    broken, name = mutant(compiled, kernel, argument, tmp_path)
    report = verify(model, images(), target=broken)
    assert not report.exact
    assert any(f"layer {kernel.rstrip('/')!r}: constant {name!r}" in one for one in report.failures)
    subject = importlib.import_module("qcompile.verify.subject")
    monkeypatch.setattr(subject, "constant_differences", lambda expected, found: [])
    assert not verify(model, images(), target=broken).exact
