"""The command line: what it prints, and how it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import trained
from safetensors.torch import save_file

import qcompile
from qcompile.cli import demo, main

FACTORY = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(),
                         nn.Flatten(), nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 3))

def wrong():
    return 7

def broken():
    raise ValueError("no such backbone")

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 3)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, tokens, extra):
        x = self.first(self.table(tokens).mean(1) + extra).relu()
        return self.head(self.second(x).relu())

def words():
    return Words()
"""


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    monkeypatch.setattr(sys, "argv", ["qcompile", *arguments])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with a model factory, its weights, labelled data, and a saved model."""
    monkeypatch.chdir(tmp_path)
    name = f"factory_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORY)
    namespace: dict = {}
    exec(FACTORY, namespace)
    torch.manual_seed(0)
    save_file(namespace["build"]().state_dict(), tmp_path / "w.safetensors")
    generator = np.random.default_rng(0)
    images = generator.normal(size=(40, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=images, y=generator.integers(0, 3, 40))
    prepared, x = trained("residual")
    qcompile.save(prepared, tmp_path / "m.qcm")
    np.savez(tmp_path / "test.npz", x=x.numpy(), y=np.array([0, 1, 2, 0]))
    np.savez(tmp_path / "halves.npz", x=x.numpy(), y=np.array([0, 1.5, 2, 0]))
    np.savez(tmp_path / "nan.npz", x=np.full_like(x.numpy(), np.nan))
    tokens, extra = generator.integers(0, 9, (20, 5)), generator.normal(size=(20, 8)).astype(np.float32)
    np.savez(tmp_path / "words.npz", tokens=tokens, extra=extra, y=generator.integers(0, 3, 20))
    return tmp_path


def _factory(folder: Path) -> str:
    return next(folder.glob("factory_*.py")).stem


def test_quantize_writes_a_file_that_loads(folder, monkeypatch, capsys):
    code, out, err = run(
        monkeypatch, capsys, "quantize", f"{_factory(folder)}:build", "--weights", "w.safetensors",
        "--bits", "2,4,8", "--calibrate", "data.npz", "-o", "out.qcm",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "wrote out.qcm" in out
    assert qcompile.modes(qcompile.load("out.qcm")) == (2, 4, 8)


def test_inspect_lists_modes_sections_and_layers(folder, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "inspect", "m.qcm", "--json")
    described = json.loads(out)
    assert code == 0
    assert [mode["mode"] for mode in described["modes"]] == [2, 3, 4]
    assert all(section["state"] == "ok" for section in described["sections"])
    layers = {layer["layer"]: layer for layer in described["layers"]}
    # conv1: 8 -> 16 channels, 3x3, stride 2 on 12 x 12
    assert layers["conv1"]["MACs"] == 36 * 16 * 8 * 9
    assert layers["conv1"]["bytes at 2"] == 2 * 16 * 8 * 9 // 8
    assert "first" in layers["stem"]["state"]
    quantised = {"conv1": 36 * 16 * 72, "conv2": 36 * 16 * 144, "down": 36 * 16 * 8, "conv3": 36 * 16 * 144}
    assert described["modes"][0]["BitOPs of quantised layers"] == 4 * sum(quantised.values())
    assert run(monkeypatch, capsys, "inspect", "m.qcm")[0] == 0


def test_eval_counts_correct_answers(folder, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "eval", "m.qcm", "--data", "test.npz", "--bits", "2", "--json")
    loaded, data = qcompile.load("m.qcm", bits=2), np.load("test.npz")
    expected = 100 * float((loaded(torch.from_numpy(data["x"])).argmax(1).numpy() == data["y"]).mean())
    assert code == 0
    assert json.loads(out)[0]["accuracy %"] == pytest.approx(expected)


def test_lower_verify_and_targets(folder, monkeypatch, capsys):
    code, out, err = run(
        monkeypatch, capsys, "lower", "m.qcm", "--target", "onnx-qdq", "--bits", "2", "-o", "build"
    )
    assert (code, err) == (0, "")
    assert all(Path(line).exists() for line in out.split())
    code, out, _ = run(monkeypatch, capsys, "verify", "m.qcm", "--bits", "3", "--samples", "2", "--json")
    assert code == 0
    assert json.loads(out)[0]["exact"] is True
    code, out, _ = run(monkeypatch, capsys, "targets", "--json")
    assert code == 0
    assert "onnx-qdq" in [row["target"] for row in json.loads(out)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "none.qcm"], "none.qcm"),
        (["inspect", "data.npz"], "data.npz"),
        (["eval", "m.qcm", "--data", "none.npz"], "none.npz"),
        (["eval", "m.qcm", "--data", "m.qcm"], "m.qcm"),
        (["eval", "m.qcm", "--data", "test.npz", "--bits", "7"], "this model has: 2, 3, 4"),
        (["eval", "m.qcm", "--data", "data.npz", "--bits", "2"], "shape"),
        (["lower", "m.qcm", "--target", "abacus", "-o", "build"], "unknown target 'abacus'; known: "),
        (["lower", "m.qcm", "--target", "onnx-qdq", "-o", "m.qcm/build"], "m.qcm"),
        (["lower", "m.qcm", "--target", "onnx-qdq", "-o", "build", "--batch", "0"], "batch"),
        (["eval", "m.qcm", "--data", "halves.npz"], "whole number"),
        (["eval", "m.qcm", "--data", "words.npz", "--target", "onnx-qdq"], "dtype"),
        (["verify", "m.qcm", "--samples", "0"], "--samples"),
        (["verify", "m.qcm", "--data", "nan.npz"], "NaN"),
        (["verify", "m.qcm", "--nonsense"], "--nonsense"),
        (["verify"], "'file'"),
        (["fly"], "fly"),
        (["eval", "m.qcm", "--data", "test.npz", "--batch", "x"], "--batch"),
        (["quantize", "FACTORY:broken", "--calibrate", "data.npz", "-o", "o.qcm"], "no such backbone"),
        (["quantize", "FACTORY:words", "--calibrate", "data.npz", "-o", "o.qcm"], "tokens, extra"),
        (["quantize", "nowhere:build", "--calibrate", "data.npz", "-o", "o.qcm"], "nowhere"),
        (["quantize", "FACTORY:missing", "--calibrate", "data.npz", "-o", "o.qcm"], "missing"),
        (["quantize", "FACTORY:wrong", "--calibrate", "data.npz", "-o", "o.qcm"], "int"),
        (["quantize", "FACTORY", "--calibrate", "data.npz", "-o", "o.qcm"], "module:function"),
        (["quantize", "FACTORY:build", "--calibrate", "data.npz", "--bits", "2,x", "-o", "o.qcm"], "2,3,4"),
        (
            ["quantize", "FACTORY:build", "--calibrate", "data.npz", "--bits", "4,2", "-o", "o.qcm"],
            "increasing",
        ),
        (
            ["quantize", "FACTORY:build", "--calibrate", "data.npz", "--scheme", "x", "-o", "o.qcm"],
            "vertical",
        ),
        (
            ["quantize", "FACTORY:build", "--calibrate", "data.npz", "--skip", "9", "-o", "o.qcm"],
            "its layers: ",
        ),
        (
            ["quantize", "FACTORY:build", "--weights", "m.qcm", "--calibrate", "data.npz", "-o", "o.qcm"],
            "m.qcm",
        ),
        (["quantize", "FACTORY:build", "--calibrate", "data.npz", "-o", "no/such/o.qcm"], "no/such"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(folder, monkeypatch, capsys, arguments, message):
    before = sorted(path.name for path in folder.rglob("*") if "__pycache__" not in str(path))
    code, _, err = run(monkeypatch, capsys, *(one.replace("FACTORY", _factory(folder)) for one in arguments))
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert sorted(path.name for path in folder.rglob("*") if "__pycache__" not in str(path)) == before


def test_models_of_several_inputs_go_through_every_command(folder, monkeypatch, capsys):
    factory = f"{_factory(folder)}:words"
    made = run(monkeypatch, capsys, "quantize", factory, "--calibrate", "words.npz", "-o", "words.qcm")
    assert made[0] == 0
    for arguments in (["verify", "words.qcm"], ["verify", "words.qcm", "--data", "words.npz", "--bits", "2"]):
        assert run(monkeypatch, capsys, *arguments)[0] == 0
    for more in ([], ["--target", "onnx-qdq", "--batch", "7"]):
        code, out, _ = run(monkeypatch, capsys, "eval", "words.qcm", "--data", "words.npz", "--json", *more)
        assert code == 0
        assert [row["samples"] for row in json.loads(out)] == [20, 20, 20]


def test_the_demo_prints_every_mode(monkeypatch, capsys):
    monkeypatch.setattr(demo, "FLOAT_EPOCHS", 1)
    monkeypatch.setattr(demo, "JOINT_EPOCHS", 1)
    code, out, _ = run(monkeypatch, capsys, "demo", "--json")
    assert code == 0
    rows = json.loads(out)
    assert [row["mode"] for row in rows] == ["float", "4 bits", "3 bits", "2 bits"]
    assert all(abs(row["trained %"] - row["lowered %"]) <= 0.3 for row in rows[1:])
    assert rows[1]["bytes read"] > rows[2]["bytes read"] > rows[3]["bytes read"]


def test_an_export_that_fails_leaves_nothing(folder, monkeypatch, capsys):
    (folder / "build" / "README.md").mkdir(parents=True)
    code, _, err = run(
        monkeypatch, capsys, "lower", "m.qcm", "--target", "onnx-qdq", "--bits", "2", "-o", "build"
    )
    assert code == 2
    assert "README.md" in err
    assert [path.name for path in (folder / "build").iterdir()] == ["README.md"]


def test_debug_shows_the_traceback(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["qcompile", "inspect", "none.qcm", "--debug"])
    with pytest.raises(qcompile.QCompileError):
        main()


def test_unknown_options_exit_with_2(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "inspect", "--nonsense")[0] == 2


@pytest.mark.parametrize("command", ["quantize", "inspect", "eval", "lower", "verify", "targets", "demo"])
def test_every_command_has_help_with_an_example(command, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, command, "--help")
    assert code == 0
    assert f"qcompile {command}" in out
    assert "Example" in out


def test_the_installed_command_runs_outside_of_the_repository(tmp_path):
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, "-m", "qcompile", "--version"]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == f"qcompile {qcompile.__version__}"
