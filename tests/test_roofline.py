"""What the machine does at most, and how much of it a lowered model reaches."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from amx import FLAGS, provide_amx
from torch import nn

import qcompile
from qcompile import roofline
from qcompile.backends.target import LoweringRequest, Peak
from qcompile.cli.bench import Subject, draw, latency_rows
from qcompile.modes import Mode
from qcompile.pack import plane_bytes
from qcompile.roofline import least_seconds, machine_peak

PEAK = Peak("vpdpbusd", 2e9, 1e6)


def request(batch: int) -> LoweringRequest:
    """Of a network at 2 bits, whose ends stay in float: layers of 135, 30 and 12 weights."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(5, 6, 1, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )
    x = torch.randn(2, 3, 6, 6)
    model = qcompile.prepare(net, x, bits=(2, 4))
    qcompile.calibrate(model, [x])
    graph = model.eval().integer_model(Mode(2, 2))
    return LoweringRequest(graph, model.signature, ((batch, 3, 6, 6),), batch)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An executable of a target that knows its machine's peak; `measured` counts."""
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path))
    found = SimpleNamespace(target="x86", request=SimpleNamespace(threads=1), measured=0, peak=PEAK)

    def measure() -> Peak | None:
        found.measured += 1
        return found.peak

    found.kind, found.measure_peak = lambda: "vnni", measure
    return found


# ---- the least time ----------------------------------------------------------------------------------------


def test_the_least_time_is_that_of_products_or_of_weights() -> None:
    run: Any = SimpleNamespace(request=request(batch=4))
    products = 4 * (135 * 36 + 30 * 9 + 12)
    weights = 4 * 135 + 2 * plane_bytes(30) + 4 * 12
    assert least_seconds(run, Peak("", 1e3, 1e9)) == pytest.approx(products / 1e3)
    assert least_seconds(run, Peak("", 1e9, 1e3)) == pytest.approx(weights / 1e3)


def test_shares_are_least_over_best_and_are_not_clipped() -> None:
    nothing = lambda: None  # noqa: E731
    subjects = {
        "x86 2 bits": Subject(nothing, "x86", 2, 64, 3e-3),
        "x86 1 bits": Subject(nothing, "x86", 1, 64, 5e-3),
        "torch": Subject(nothing, "torch"),
    }
    times = {"x86 2 bits": [6e-3, 8e-3, 4e-3], "x86 1 bits": [4e-3] * 3, "torch": [2e-3, 3e-3, 4e-3]}
    rows = latency_rows(subjects, times)
    assert [row["target"] for row in rows] == ["x86", "x86", "torch"]
    assert [row["best ms"] for row in rows] == pytest.approx([4, 4, 2])
    assert [row["median ms"] for row in rows] == pytest.approx([6, 4, 3])
    assert [row["against first"] for row in rows] == pytest.approx([1, 1, 0.5])
    assert [row["share of peak"] for row in rows[:2]] == pytest.approx([0.75, 1.25])
    assert rows[2]["share of peak"] is None


def test_a_plot_has_two_bars_for_every_alternative(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw("here", {"x86 2 bits": [1e-3, 2.5e-3, 3e-3], "torch": [4e-3]}, tmp_path / "bars.svg")
    draw("here", {"x86 2 bits": [1e-3]}, tmp_path / "bars.png")
    text = (tmp_path / "bars.svg").read_text()
    for shown in ("<!-- x86 2 bits -->", "<!-- torch -->", "<!-- 1 -->", "<!-- 2.5 -->", "<!-- 4 -->"):
        assert shown in text
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


# ---- what is kept ------------------------------------------------------------------------------------------


def test_a_peak_is_measured_once_for_a_machine_and_its_threads(run: Any, monkeypatch: Any) -> None:
    assert machine_peak(run) == machine_peak(run) == PEAK
    assert run.measured == 1
    run.request.threads = 2
    machine_peak(run)
    monkeypatch.setattr(roofline, "machine_name", lambda: "another machine")
    machine_peak(run)
    assert run.measured == 3


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"instruction": "a", "products": 0, "bandwidth": 1}'])
def test_a_spoilt_peak_is_measured_again(run: Any, tmp_path: Path, content: str) -> None:
    machine_peak(run)
    (path,) = (tmp_path / "peak").iterdir()
    path.write_text(content)
    assert machine_peak(run) == PEAK
    assert run.measured == 2
    assert json.loads(path.read_text()) == vars(PEAK)


def test_other_runtimes_have_no_peak(run: Any, tmp_path: Path) -> None:
    run.kind = lambda: None
    assert machine_peak(run) is None
    assert run.measured == 0
    assert not (tmp_path / "peak").exists()


# ---- what is measured --------------------------------------------------------------------------------------


def _kinds() -> list[Any]:
    """Kinds of processors whose instructions can be executed or emulated here."""
    can = {"amx": "avx512_vnni" in FLAGS, "vnni": "avx512_vnni" in FLAGS, "avx2": "avx2" in FLAGS}
    arm = shutil.which("aarch64-linux-gnu-gcc") is not None and shutil.which("qemu-aarch64") is not None
    able = {**can, "dotprod": arm, "neon": arm}
    return [
        pytest.param(name, marks=pytest.mark.skipif(not there, reason=f"no {name} here"))
        for name, there in able.items()
    ]


def opener(kind: str, folder: Path) -> tuple[Any, Callable[[Any], list[np.ndarray]]]:
    """The instruction of a kind, and what runs a measurement's kernel on two threads: its sums, by task."""
    pytest.importorskip("tvm")
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    from qcompile.backends.tvm import artefact, peak, processors
    from qcompile.backends.tvm.emulated import Emulated
    from qcompile.backends.tvm.library import Library

    if kind == "amx":
        provide_amx()
    architecture, processor = next(
        (one, dataclasses.replace(each, condition="1"))
        for one in (processors.X86, processors.ARM)
        for each in one.processors
        if each.name == kind
    )

    def sums(measurement: Any) -> list[np.ndarray]:
        inputs = [(tuple(one.shape), str(one.dtype).partition(".")[2]) for one in measurement.inputs]
        outputs = [(measurement.output, "int32")]
        made = artefact.kernel_artefact(measurement.kernel, inputs, outputs, architecture, processor, folder)
        library = Library(made, 2) if architecture is processors.X86 else Emulated(made, 2)
        (found,) = library.run(list(measurement.inputs))
        return [one.numpy().astype(np.int64) for one in found]

    return peak.instruction_of(processor), sums


@pytest.mark.parametrize("kind", _kinds())
def test_every_multiply_addition_that_is_counted_is_computed(kind: str, tmp_path: Path) -> None:
    instruction, sums = opener(kind, tmp_path)
    from qcompile.backends.tvm.peak import TABLE, multiplications

    measurement = multiplications(instruction, 2, 100_000)
    codes, weights = (one.numpy().astype(np.int64) for one in measurement.inputs)
    each = instruction.chains * instruction.size * (16 if kind == "amx" else 1)
    rounds = round(measurement.work / each / 2)
    assert measurement.work == 2 * rounds * each
    assert 0 < rounds * each <= 100_000
    if kind == "amx":
        rows = codes.reshape(2, 16, 16, 4)  # tile, pixel, group, value
        columns = weights.reshape(2, 16, 16, 4)  # tile, group, output, value
        expected = rounds * np.einsum("apkj,bkoj->abpo", rows, columns).reshape(4, 256)
    else:
        used = weights[np.arange(rounds) % TABLE].sum(0)
        expected = (codes * used).sum(-1)
    for found in sums(measurement):  # one per task
        np.testing.assert_array_equal(found if kind == "amx" else found.sum(-1), expected)


@pytest.mark.parametrize("kind", _kinds())
def test_the_whole_buffer_is_read(kind: str, tmp_path: Path) -> None:
    _, sums = opener(kind, tmp_path)
    from qcompile.backends.tvm.peak import reading

    measurement = reading(2, 2**16)
    assert measurement.work == 4 * measurement.inputs[0].numel() == 2**16
    for found in sums(measurement):
        assert found.sum() == measurement.inputs[0].numel() // 2
