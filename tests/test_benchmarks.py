"""What benchmarks compute from the times that they measure."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qcompile
from qcompile.backends.target import LoweringRequest, Peak
from qcompile.modes import Mode

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def path() -> Any:
    """Benchmarks import each other."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def load(name: str) -> ModuleType:
    """A script of the folder."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


# ---- cost_line ---------------------------------------------------------------------------------------------


@given(
    st.floats(0, 1e-4),
    st.floats(1e-12, 1e-10),
    st.lists(st.integers(10**6, 4 * 10**9), min_size=3, max_size=20, unique=True),
)
def test_times_on_a_line_give_that_line(a: float, b: float, work: list[int]) -> None:
    cost_line: Any = sys.modules.get("cost_line") or load("cost_line")
    seconds = [a + b * one for one in work]
    assert cost_line.farthest(work, seconds, *cost_line.nearest_line(work, seconds)) == pytest.approx(1)


def test_the_line_has_the_least_relative_error_and_starts_at_zero_or_above() -> None:
    cost_line: Any = load("cost_line")
    generator = np.random.default_rng(0)
    work = np.geomspace(1e6, 4e9, 20)
    seconds = (5e-6 + work / 2e11) * generator.uniform(0.8, 1.25, 20)

    def error(a: float, b: float) -> float:
        return float(np.sum(((a + b * work) / seconds - 1) ** 2))

    a, b = cost_line.nearest_line(work, seconds)
    assert a > 0
    assert all(error(a, b) < error(a * i, b * j) for i in (0.9, 1, 1.1) for j in (0.9, 1, 1.1) if i * j != 1)
    bent = (work / 1e6) ** 1.2 * 1e-6  # the line would start below zero
    a, b = cost_line.nearest_line(work, bent)
    seconds = bent
    assert a == 0
    assert error(0, b) < min(error(0, 1.01 * b), error(0, 0.99 * b))


def test_a_line_holds_best_and_median_of_every_layer_and_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cost_line: Any = load("cost_line")
    times = {one: [4e-3, 1e-9 * cost_line.work_of(*one), 3e-3] for one in ((14, 32), (14, 64), (28, 64))}
    times[28, 64][1] *= 1.5
    line = cost_line.line_of(2, times)
    assert [one["best s"] for one in line.layers] == [min(one) for one in times.values()]
    assert [one["median s"] for one in line.layers] == [sorted(one)[1] for one in times.values()]
    assert line.layers[0]["work"] == 14 * 14 * 32 * 32 * 9
    assert 1.1 < line.ratio < 1.5
    cost_line.draw([line, line], tmp_path / "line.png")
    assert (tmp_path / "line.png").read_bytes().startswith(b"\x89PNG")


# ---- x86_peers ---------------------------------------------------------------------------------------------


def test_statistics_of_batch_normalisation_are_those_of_the_batch() -> None:
    networks: Any = load("networks")
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.3)), 5 * torch.randn(8, 3, 6, 6)
    found = networks.with_statistics(net, x)
    assert not found.training
    assert found[1].momentum == 0.3
    normalised = found(x).detach()
    assert torch.allclose(normalised.mean((0, 2, 3)), torch.zeros(4), atol=1e-5)
    assert torch.allclose(normalised.std((0, 2, 3)), torch.ones(4), atol=1e-2)


def test_slowest_layers_are_those_that_lose_most_against_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    peers: Any = load("x86_peers")
    torch.manual_seed(0)
    net, x = nn.Sequential(*(nn.Conv2d(2, 2, 3) for _ in range(3))), torch.randn(1, 2, 8, 8)
    model = qcompile.prepare(net, x, bits=(2, 4))
    qcompile.calibrate(model, [x])
    request = LoweringRequest(model.eval().integer_model(Mode(2, 2)), model.signature, ((1, 2, 8, 8),), 1)
    monkeypatch.setattr(peers, "machine_peak", lambda run: Peak("", 36e6, 1.0))
    seconds = {
        "0": 40e-6,
        "1": 30e-6,
        "2": 4.5e-6,
        "": 1e-6,
    }  # 36 * 36, 36 * 16 and 36 * 4 multiply-additions
    run = SimpleNamespace(request=request, layer_seconds=lambda inputs, runs: seconds)
    rows = peers.slowest_layers(run, x, 3)
    assert [row["layer"] for row in rows] == ["1", "0", ""]
    assert [row["lost us"] for row in rows] == pytest.approx([14, 4, 1])
    assert [row["GMAC/s"] for row in rows] == pytest.approx([36 * 16 / 30e3, 36 * 36 / 40e3, 0])
    assert rows[0]["share of time"] == pytest.approx(30 / 75.5)


def test_tables_of_peers_show_ratios_and_shares(capsys: pytest.CaptureFixture[str]) -> None:
    peers: Any = load("x86_peers")
    row = {"batch": 1, "threads": 2, "best ms": 4.0, "median ms": 5.0}
    own = {"least ms": 3.0, "lowered in s": 7.2, "shared object MB": 1.25, "layers": []}
    rows = [{"name": "torch", "against": 1.0, **row}, {"name": "w2a2", "against": 0.75, **row, **own}]
    peers.show("resnet18", rows, "torch")
    lines = capsys.readouterr().out.splitlines()
    assert "against torch" in lines[1]
    assert lines[3] == "| torch | 1 | 2 | 4.00 | 5.00 | 1.00 |  |  |  |"
    assert lines[4] == "| w2a2 | 1 | 2 | 4.00 | 5.00 | 0.75 | 0.75 | 7 | 1.2 |"
