"""Commands with the targets x86 and arm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from amx import FLAGS
from test_cli import run
from verify_networks import Residual, images, trained

import qcompile

pytest.importorskip("tvm")
from qcompile.backends.tvm.processors import ARM

pytestmark = pytest.mark.skipif(
    "avx2" not in FLAGS or shutil.which("gcc") is None, reason="needs a processor with AVX2, and gcc"
)
needs_arm = pytest.mark.skipif(
    shutil.which(ARM.compiler) is None or shutil.which(ARM.emulator) is None,
    reason=f"needs the Debian packages {ARM.package} {ARM.emulator_package}",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a saved model of the modes 2, 3 and 4."""
    monkeypatch.chdir(tmp_path)
    qcompile.save(trained(Residual, images()), tmp_path / "m.qcm")
    return tmp_path


@needs_arm
def test_lower_and_verify_for_arm(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    code, out, err = run(
        monkeypatch,
        capsys,
        "lower",
        "m.qcm",
        "--target",
        "arm",
        "--bits",
        "2",
        "--cpu",
        "cortex-a72",
        "-o",
        "b",
    )
    assert (code, err) == (0, "")
    assert {Path(one).name for one in out.split()} >= {"libmodel.so", "model.h", "runner", "README.md"}
    code, out, _ = run(
        monkeypatch, capsys, "verify", "m.qcm", "--target", "arm", "--bits", "2", "--samples", "2", "--json"
    )
    assert code == 0
    assert json.loads(out)[0]["exact"] is True
    assert json.loads(out)[0]["target"] == "arm"


def test_bench_measures_every_mode_and_target(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    code, out, _ = run(
        monkeypatch,
        capsys,
        *("bench", "m.qcm", "--against", "onnx-qdq", "--bits", "2", "--runs", "2", "--json"),
        *("--plot", "bars.svg", "--peers", "torch", "--float", "verify_networks:Residual"),
    )
    found = json.loads(out)
    rows = found["latencies"]
    assert code == 0
    assert (found["batch"], found["threads"]) == (1, 1)
    assert [row["target"] for row in rows] == ["x86", "onnx-qdq", "torch"]
    assert all(row["median ms"] >= row["best ms"] > 0 for row in rows)
    assert rows[0]["against first"] == 1.0
    assert rows[0]["arena bytes"] > 0
    assert 0 < rows[0]["share of peak"] < 1
    assert rows[1]["share of peak"] is rows[2]["share of peak"] is None
    assert found["peaks"].keys() == {"x86"}
    assert all(found["peaks"]["x86"].values())
    assert "<!-- x86 2 -->" in (folder / "bars.svg").read_text()


def test_inspect_shows_kernels_and_working_memory(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    code, out, _ = run(monkeypatch, capsys, "inspect", "m.qcm", "--target", "x86", "--json")
    compiled = json.loads(out)["compiled"]
    assert code == 0
    assert [one["mode"] for one in compiled] == [2, 3, 4]
    for one in compiled:
        assert one["arena bytes"] > 0
        kernels = {row["layer"]: row["kernel"] for row in one["kernels"]}
        assert kernels["block1.conv1"].endswith(f"w{one['mode']}a{one['mode']}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["lower", "m.qcm", "--target", "onnx-qdq", "--cpu", "znver4", "-o", "b"],
            "neither cpu nor features",
        ),
        (
            ["lower", "m.qcm", "--target", "x86", "--features", "sve", "-o", "b"],
            "knows amx, bitalg, vnni, avx2",
        ),
        (["lower", "m.qcm", "--target", "x86", "--cpu", "pentium", "-o", "b"], "lacks avx2"),
        (["lower", "m.qcm", "--target", "x86", "--cpu", "nonsense", "-o", "b"], "LLVM knows"),
        (["bench", "m.qcm", "--runs", "0"], "--runs must be at least 1"),
        (["bench", "m.qcm", "--plot", "bars.gif"], "--plot bars.gif ends in none of .svg, .png"),
        (["bench", "m.qcm", "--peers", "torch"], "--float net:build"),
        (
            ["bench", "m.qcm", "--bits", "2", "--peers", "tflite", "--float", "nets:Residual"],
            "none of the peers",
        ),
        pytest.param(["bench", "m.qcm", "--target", "arm", "--bits", "2"], "./runner -r", marks=needs_arm),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    folder: Path, monkeypatch: Any, capsys: Any, arguments: list[str], message: str
) -> None:
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert message in err
    assert not (folder / "b").exists()
