"""Nonuniform quantisers in machine code: joined with layers and alone, on every kind of processor."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from amx import FLAGS
from threshold_graphs import NonuniformFormulas, nonuniform, request_of_corners, scattered
from verify_networks import Bottleneck, images, trained

import qcompile
from qcompile.model import QuantModel
from qcompile.verify import formulas, verify

pytest.importorskip("tvm")
pytestmark = pytest.mark.skipif(
    "avx2" not in FLAGS or shutil.which("gcc") is None, reason="needs a processor with AVX2, and gcc"
)

from qcompile.backends.tvm import X86Target  # noqa: E402
from qcompile.backends.tvm.artefact import kernel_artefact  # noqa: E402
from qcompile.backends.tvm.kernels.elementwise import epilogue_kernel  # noqa: E402
from qcompile.backends.tvm.library import Library  # noqa: E402
from qcompile.backends.tvm.maps import Map, from_memory, to_memory  # noqa: E402
from qcompile.backends.tvm.processors import ARM, X86, Processor  # noqa: E402
from qcompile.backends.tvm.specs import Steps  # noqa: E402

needs_emulator = pytest.mark.skipif(
    shutil.which(ARM.compiler) is None or shutil.which(ARM.emulator) is None,
    reason=f"needs the Debian packages {ARM.package} {ARM.emulator_package}",
)
#: Kernels of all families are tested one by one.
KINDS = [("x86", "avx2"), pytest.param("arm", "neon", marks=needs_emulator)]


@pytest.fixture(autouse=True)
def _formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(formulas._FORMULAS, "vertical", NonuniformFormulas())


@pytest.fixture(scope="module")
def prepared() -> QuantModel:
    return trained(Bottleneck, images())


@pytest.mark.parametrize(("target", "kind"), KINDS)
def test_networks_are_exact(prepared: QuantModel, target: str, kind: str) -> None:
    model = nonuniform(prepared, scattered())
    compiled = qcompile.lower(model, target, bits=3, batch=len(images()), threads=1, features=(kind,))
    report = verify(model, images(), target=compiled)
    assert report.failures == ()
    assert sum(one.codes_compared for one in report.layers if one.operator == "threshold")
    kernels = [one["kernel"] for one in compiled.kernels()]
    assert "threshold" not in kernels  # they joined their layers
    assert any(one.startswith("depthwise") for one in kernels)


def test_equivalent_thresholds_change_no_bit(prepared: QuantModel) -> None:
    options: dict[str, Any] = {"bits": 3, "batch": len(images()), "threads": 1, "features": ("avx2",)}
    uniform = qcompile.lower(prepared, "x86", **options)
    assert torch.equal(qcompile.lower(nonuniform(prepared), "x86", **options)(images()), uniform(images()))


def test_a_changed_threshold_of_the_shared_object_names_the_layer(
    prepared: QuantModel, tmp_path: Path
) -> None:
    model = nonuniform(prepared, scattered())
    compiled: Any = qcompile.lower(model, "x86", bits=3, batch=len(images()), threads=1, features=("avx2",))
    content = bytearray(compiled.artefact.library.read_bytes())
    table = next(
        one
        for name, one in compiled.constants().items()
        if name.startswith("expand/") and one.dtype == np.int32 and one.shape == (8, 16)
    )
    at = content.find(table.tobytes())
    assert at >= 0
    content[at + 4 * 16 * 4] ^= 128  # a threshold in the middle
    (tmp_path / "libmodel.so").write_bytes(content)
    compiled.library = Library(replace(compiled.artefact, folder=tmp_path), 1)
    report = verify(model, images(), target=compiled)
    assert any("layer 'expand': constant" in one for one in report.failures)


@pytest.mark.parametrize("levels", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_thresholds_of_all_kinds_of_integers_are_exact(levels: int) -> None:
    request, x = request_of_corners(levels)
    compiled = X86Target().compile(replace(request, features=("avx2",)))
    expected, values = request.model.run_with_values((x,))
    trace = compiled.trace([x.numpy()])
    for found, wanted in zip(trace.outputs, expected, strict=True):
        np.testing.assert_array_equal(found, wanted.numpy())
    for node in request.model.graph.nodes:
        if request.model.operator_name(node) == "threshold":
            np.testing.assert_array_equal(trace.values[node.name], values[node.name].numpy())
    kernels = [one["kernel"] for one in compiled.kernels()]
    assert kernels.count("threshold") == 5  # those of the rows joined their layer


@pytest.mark.parametrize(
    ("dtype", "zero_point", "levels", "low"),
    [("uint8", 8, 7, -3), ("int32", 0, 15, 0), ("int64", 0, 3, 1), ("int32", 0, 255, 0)],
)
def test_kernels_of_their_own(dtype: str, zero_point: int, levels: int, low: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(levels)
    source = Map(2, 3, 5, 20, dtype, zero_point, (1, 1, 0, 2))
    target = Map(2, 3, 5, 20, "uint8", max(0, -low), (0, 1, 2, 0))
    reach = {"uint8": 8, "int32": 2**31 - 2, "int64": 2**40}[dtype]
    x = rng.integers(-reach, reach + 1, (2, 20, 3, 5))
    sign = rng.choice([-1, 1], 20)
    thresholds = np.sort(rng.integers(-min(reach, 2**31 - 1), min(reach, 2**31 - 1), (levels, 20)), 0)
    output = Steps(target, 0, levels, low)
    constants = np.zeros(output.constants, np.int64)
    constants[0, :20], constants[1:, :20] = sign, thresholds + sign * zero_point
    kernel = epilogue_kernel("threshold", output, (source,))
    arrays = [to_memory(x, source), constants.astype(np.int32), np.zeros(target.shape, np.uint8)]
    tensors = [(one.shape, str(one.dtype)) for one in arrays]
    processor = Processor("here", {"mcpu": "haswell"}, frozenset(("avx2",)), "1")
    artefact = kernel_artefact(kernel, tensors[:2], tensors[2:], X86, processor, tmp_path)
    given = [torch.from_numpy(np.ascontiguousarray(one)).clone() for one in arrays[:2]]
    (found,) = Library(artefact, 1).run(given)
    signed = x * sign[:, None, None]
    expected = low + (signed >= thresholds[:, None, :, None, None]).sum(0)
    np.testing.assert_array_equal(from_memory(found.numpy(), target), expected)
