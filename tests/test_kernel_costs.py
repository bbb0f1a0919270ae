"""The choice between families of kernels: by what was measured, kept by machine, or by estimates."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from verify_networks import Residual, images, trained

pytest.importorskip("tvm")
pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")

import qcompile  # noqa: E402
from qcompile.backends.tvm import costs  # noqa: E402
from qcompile.backends.tvm.costs import Costs  # noqa: E402
from qcompile.backends.tvm.families import Family  # noqa: E402
from qcompile.backends.tvm.maps import Map  # noqa: E402
from qcompile.backends.tvm.packing import runs_of  # noqa: E402
from qcompile.backends.tvm.present import present  # noqa: E402
from qcompile.backends.tvm.processors import ARM, X86, Processor  # noqa: E402
from qcompile.backends.tvm.specs import Layer  # noqa: E402
from qcompile.errors import InvalidArgument  # noqa: E402
from qcompile.verify import verify  # noqa: E402

PROCESSOR = Processor("any", {}, frozenset(("bitalg", "vnni", "avx512", "avx2")), "1")


def layer(bits: int) -> Layer:
    source = Map(1, 28, 28, 128, "uint8", 0, (1, 1, 1, 1))
    runs = runs_of((128, 128, 3, 3), 128, (1, 1), 1)
    return Layer(source, runs, (1, 1), (1, 1), (1, 1), 28, 28, 2**bits - 1, bits, True, 0, 0, False, (), ())


class Clock:
    """In place of measuring: what it is told, and how often it was asked."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self.seconds, self.calls = seconds, 0

    def __call__(self, layer: Layer, families: Mapping[str, Family], *rest: Any) -> dict[str, float]:
        self.calls += 1
        return {name: self.seconds.get(name, 1.0) for name in families}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path))
    monkeypatch.delenv("QCOMPILE_COSTS")
    monkeypatch.setattr(costs, "_kept", {})
    return tmp_path


def test_the_fastest_that_was_measured_is_chosen_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimated = Costs(X86, PROCESSOR, False).choose(layer(2))
    assert (estimated.family.name, estimated.is_measured) == ("winograd", False)
    clock = Clock({"vnni": 1e-6, "winograd": 2e-6})
    monkeypatch.setattr(costs, "measure", clock)
    found = Costs(X86, PROCESSOR, True).choose(layer(2))
    assert (found.family.name, found.is_measured) == ("vnni", True)
    assert found.seconds["winograd"] == 2e-6
    monkeypatch.setattr(costs, "_kept", {})  # another process
    clock.seconds = {"vnni": 3e-6, "winograd": 1e-6}
    again = Costs(X86, PROCESSOR, True)
    assert again.choose(layer(2)).family.name == "vnni"
    assert clock.calls == 1
    # what decides is the table of this layer alone
    assert again.choose(layer(4)).family.name == "winograd"
    assert clock.calls == 2
    # tuning measures again, everything that can compute the layer
    tuned = Costs(X86, PROCESSOR, True, tune=True).choose(layer(2))
    assert tuned.family.name == "winograd"
    assert set(tuned.seconds) > set(found.seconds)
    assert Costs(X86, PROCESSOR, True).choose(layer(2)).family.name == "winograd"


@pytest.mark.parametrize("content", ["{", "[]", '{"vnni": "fast", "winograd": -1}', '{"vnni": 1}'])
def test_tables_that_are_no_tables_are_measured_again(
    content: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock({"vnni": 1e-6, "winograd": 2e-6})
    monkeypatch.setattr(costs, "measure", clock)
    Costs(X86, PROCESSOR, True).choose(layer(2))
    (table,) = (cache / "kernels").glob("*.json")
    good = json.loads(table.read_text())
    table.write_text(content)
    monkeypatch.setattr(costs, "_kept", {})
    assert Costs(X86, PROCESSOR, True).choose(layer(2)).family.name == "vnni"
    assert clock.calls == 2
    assert json.loads(table.read_text()) == good


def test_estimates_decide_where_nothing_is_measured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> dict[str, float]:
        raise AssertionError("measured")

    monkeypatch.setattr(costs, "measure", forbidden)
    assert not Costs(X86, PROCESSOR, False).choose(layer(2)).is_measured
    monkeypatch.setenv("QCOMPILE_COSTS", "estimate")
    assert not Costs(X86, PROCESSOR, True).choose(layer(2)).is_measured


def test_this_machine_is_the_first_kind_whose_condition_holds() -> None:
    flags = Path("/proc/cpuinfo").read_text()
    kinds = X86.processors
    here = present(X86, kinds)
    assert (here is None) == ("avx2" not in flags.split())
    if here is not None:
        # every kind behind it is there, too, and none in front of it
        index = kinds.index(here)
        assert [present(X86, [one]) for one in kinds] == [None] * index + list(kinds[index:])
        assert (index == 0) <= ("amx_int8" in flags.split())
        assert ("avx512_vnni" in flags.split()) >= ("vnni" in here.features)
    foreign = dataclasses.replace(ARM, machine=("no such machine",))
    assert present(foreign, foreign.processors) is None


@pytest.mark.slow
def test_measured_models_are_exact_and_say_what_was_considered(cache: Path) -> None:
    torch.manual_seed(0)
    model = trained(Residual, images())
    compiled = qcompile.lower(
        model, "x86", bits=2, batch=len(images()), threads=1, features=("avx2",), tune=True
    )
    assert verify(model, images(), target=compiled).exact
    rows = [one for one in compiled.kernels() if "considered us" in one]
    assert rows
    for row in rows:
        assert row["considered by"] == "measurement"
        assert row["kernel"].split()[0] == min(row["considered us"], key=row["considered us"].__getitem__)
    with pytest.raises(InvalidArgument, match="tune"):
        qcompile.lower(model, "onnx-qdq", bits=2, tune=True)
