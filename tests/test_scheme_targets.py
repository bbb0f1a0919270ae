"""Every scheme on every target: all modes compute the same integers, also from a file that was saved."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from amx import FLAGS
from nets import shaken, trained
from torch import Tensor

import qcompile
from qcompile.model import QuantModel

#: name -> (scheme, modes)
SCHEMES: dict[str, tuple[str, tuple[int, ...]]] = {
    "vertical": ("vertical", (1, 2, 4, 8)),
    "quantizable": ("quantizable", (1, 2, 4, 8, 32)),
    "n2uq": ("n2uq", (1, 2, 3, 4, 8)),
    "multibranch": ("multibranch", (2, 4, 6, 8)),
    "multibranch with a half branch": ("multibranch", (2, 3, 4)),
}
ONNX = ("onnx-qdq", "onnx-packed")
#: One kind of processor each; all kinds have tests of their own.
COMPILED = {"x86": "avx2", "arm": "neon"}

NEW = tuple(name for name in SCHEMES if name != "vertical")


@cache
def _prepared(name: str, network: str) -> tuple[QuantModel, Tensor]:
    scheme, bits = SCHEMES[name]
    if scheme == "n2uq":
        return shaken(network, bits)
    return trained(network, 2, scheme=scheme, bits=bits)


def _check(model: QuantModel, x: Tensor, target: str, modes: Sequence[int | str]) -> None:
    for bits in modes:
        if target in ONNX:
            report = qcompile.verify(model, x, bits=bits, target=target)
        else:
            _require(target)
            options = {"batch": len(x), "threads": 1, "features": (COMPILED[target],)}
            report = qcompile.verify(model, x, target=qcompile.lower(model, target, bits=bits, **options))
        assert report.exact, (bits, report.failures)


def _require(target: str) -> None:
    pytest.importorskip("tvm")
    if target == "x86" and ("avx2" not in FLAGS or shutil.which("gcc") is None):
        pytest.skip("needs a processor with AVX2, and gcc")
    if target == "arm":
        from qcompile.backends.tvm.processors import ARM

        if shutil.which(ARM.compiler) is None or shutil.which(ARM.emulator) is None:
            pytest.skip(f"needs {ARM.package} {ARM.emulator_package}")


def test_all_targets_are_here() -> None:
    assert {*ONNX, *COMPILED} == set(qcompile.targets())


@pytest.mark.parametrize("target", ONNX)
@pytest.mark.parametrize("name", SCHEMES)
def test_onnx_models_of_loaded_files_are_exact(name: str, target: str, tmp_path: Path) -> None:
    model, x = _prepared(name, "mobile")
    qcompile.save(model, tmp_path / "model.qcm", modes=qcompile.modes(model))
    loaded = qcompile.load(tmp_path / "model.qcm")
    assert qcompile.modes(loaded) == SCHEMES[name][1]
    _check(loaded, x, target, qcompile.modes(loaded))


@pytest.mark.parametrize(
    ("name", "target", "bits"),
    [
        pytest.param("quantizable", "x86", 8, marks=pytest.mark.slow),
        ("n2uq", "x86", 2),
        pytest.param("n2uq", "arm", 3, marks=pytest.mark.slow),
        ("multibranch", "x86", 4),
        pytest.param("multibranch with a half branch", "x86", 3, marks=pytest.mark.slow),
    ],
)
def test_compiled_models_are_exact(name: str, target: str, bits: int, tmp_path: Path) -> None:
    model, x = _prepared(name, "plain")
    qcompile.save(model, tmp_path / "model.qcm")
    _check(qcompile.load(tmp_path / "model.qcm", bits=bits), x, target, [bits])


@pytest.mark.slow
@pytest.mark.parametrize("target", ONNX)
@pytest.mark.parametrize("network", ["residual", "plain", "dense", "signal"])
@pytest.mark.parametrize("name", SCHEMES)
def test_every_mode_is_exact_in_onnx(name: str, network: str, target: str) -> None:
    _check(*_prepared(name, network), target, SCHEMES[name][1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "network", "target"),
    [
        *[(name, network, "x86") for name in NEW for network in ("residual", "mobile")],
        *[(name, "mobile", "arm") for name in NEW],
        *[(name, "signal", "x86") for name in ("quantizable", "n2uq")],
        ("n2uq", "dense", "x86"),
    ],
)
def test_every_mode_is_exact_in_machine_code(name: str, network: str, target: str) -> None:
    _check(*_prepared(name, network), target, SCHEMES[name][1])
