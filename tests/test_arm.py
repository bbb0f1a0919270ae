"""The target arm: cross-compiled, exact under emulation on processors with and without dot products."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from verify_networks import Residual, images, trained

import qcompile
from qcompile.errors import InvalidArgument, MissingExtra
from qcompile.model import QuantModel
from qcompile.verify import verify

pytest.importorskip("tvm")
from qcompile.backends.tvm.emulated import Emulated
from qcompile.backends.tvm.processors import ARM

pytestmark = pytest.mark.skipif(
    shutil.which(ARM.compiler) is None or shutil.which(ARM.emulator) is None,
    reason=f"needs the Debian packages {ARM.package} {ARM.emulator_package}",
)


@pytest.fixture(scope="module")
def model() -> QuantModel:
    return trained(Residual, images())


@pytest.fixture(scope="module")
def compiled(model: QuantModel) -> Any:
    return qcompile.lower(model, "arm", bits=2, batch=len(images()), threads=1)


@pytest.mark.parametrize(
    ("kind", "emulated", "family"), [("neon", "cortex-a72", "smlal"), ("dotprod", "cortex-a76", "sdot")]
)
def test_every_kind_of_processor_is_exact(
    model: QuantModel, kind: str, emulated: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QEMU_CPU", emulated)  # an instruction that it lacks would end the run
    run = qcompile.lower(model, "arm", bits=4, batch=len(images()), features=(kind,))
    assert verify(model, images(), target=run).failures == ()
    assert any(family in one["kernel"] for one in run.kernels())


def test_the_processor_is_chosen_when_the_model_starts(
    compiled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images().numpy().tofile(tmp_path / "in.bin")
    compiled.export(tmp_path / "build")
    for cpu, kind in (("cortex-a72", "neon"), ("cortex-a76", "dotprod")):
        command = [ARM.emulator, "-cpu", cpu, "-L", ARM.sysroot, "./runner", "-r", "1"]
        done = subprocess.run(
            [*command, "../in.bin", f"../{cpu}.bin"],
            cwd=tmp_path / "build",
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.startswith(f"{kind}:")
    assert (tmp_path / "cortex-a72.bin").read_bytes() == (tmp_path / "cortex-a76.bin").read_bytes()


@pytest.mark.slow
def test_bit_serial_kernels_are_picked_where_they_are_cheaper_and_are_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QEMU_CPU", "cortex-a72")
    model = trained(Residual, images(), bits=(1, 2))
    run = qcompile.lower(model, "arm", bits=1, batch=len(images()), cpu="cortex-a72")
    assert any("bit-serial" in one["kernel"] for one in run.kernels())
    assert verify(model, images(), target=run).failures == ()


def test_a_cpu_selects_its_instructions(model: QuantModel) -> None:
    kernels = qcompile.lower(model, "arm", bits=4, cpu="cortex-a76").kernels()
    assert any("sdot" in one["kernel"] for one in kernels)
    with pytest.raises(InvalidArgument, match="cortex-a7"):
        qcompile.lower(model, "arm", bits=4, cpu="cortex-9")
    with pytest.raises(InvalidArgument, match="dotprod, neon"):
        qcompile.lower(model, "arm", bits=4, features=("vnni",))
    with pytest.raises(InvalidArgument, match="not both"):
        qcompile.lower(model, "arm", bits=4, cpu="cortex-a76", features=("neon",))


def test_outputs_are_those_of_the_model(model: QuantModel, compiled: Any) -> None:
    x = images()
    expected = qcompile.at(model, 2)(x)
    assert torch.allclose(compiled(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert not compiled.is_native


def test_the_exported_folder_builds_and_runs_from_its_page(compiled: Any, tmp_path: Path) -> None:
    compiled.export(tmp_path / "build")
    images().numpy().tofile(tmp_path / "build" / "input_0.bin")
    page = (tmp_path / "build" / "README.md").read_text()
    commands = [line.strip() for line in page.splitlines() if line.startswith("    ")]
    outputs = []
    for wanted in (f"{ARM.compiler} -O2", f"{ARM.emulator} -L {ARM.sysroot} ./example"):
        (command,) = (one for one in commands if one.startswith(wanted))
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=tmp_path / "build",
            env={"PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.append(done.stdout)
    found = np.array([float(line) for line in outputs[1].split()], np.float32)
    np.testing.assert_array_equal(found, compiled(images()).numpy().reshape(-1))


def test_a_missing_compiler_or_emulator_names_the_package(
    model: QuantModel, compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MissingExtra, match="apt-get install gcc-aarch64-linux-gnu"):
        qcompile.lower(model, "arm", bits=2)
    with pytest.raises(MissingExtra, match="apt-get install qemu-user"):
        compiled(images())


def test_a_changed_number_is_found(model: QuantModel, compiled: Any, tmp_path: Path) -> None:
    name = next(one for one in compiled.constants() if one.startswith("block1.conv1/") and "sdot" in one)
    array = compiled.constants()[name]
    content = bytearray(compiled.artefact.library.read_bytes())
    place = content.find(array.tobytes())
    assert place >= 0
    content[place] ^= 1
    broken = object.__new__(type(compiled))
    broken.__dict__.update(compiled.__dict__)
    artefact = object.__new__(type(compiled.artefact))
    artefact.__dict__.update({**compiled.artefact.__dict__, "folder": tmp_path})
    (tmp_path / "libmodel.so").write_bytes(content)
    shutil.copy(compiled.artefact.folder / "runner", tmp_path / "runner")
    broken.library = Emulated(artefact, 1)
    report = verify(model, images(), target=broken)
    assert not report.exact
    assert any("layer 'block1.conv1': constant" in one for one in report.failures)
