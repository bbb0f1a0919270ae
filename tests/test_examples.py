"""The example loops run as their pages say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import qcompile

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def _run(*command: str) -> dict[str, float]:
    """Accuracies by mode that a script prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split(": ") for line in done.stdout.splitlines() if " bits: " in line]
    return {name: float(value.removesuffix(" %")) for name, value in lines}


def _all_learned(scores: dict[str, float]) -> bool:
    return set(scores) == {"2 bits", "3 bits", "4 bits"} and min(scores.values()) > 60


def test_plain_loop(tmp_path):
    path = tmp_path / "digits.qcm"
    script = str(EXAMPLES / "train_plain.py")
    options = ("--steps", "120", "--amp", "bf16", "--accumulate", "2", "--save", str(path))
    assert _all_learned(_run(script, *options))
    assert qcompile.modes(qcompile.load(path)) == (2, 3, 4)


@pytest.mark.slow
def test_plain_loop_compiled():
    assert _all_learned(_run(str(EXAMPLES / "train_plain.py"), "--steps", "120", "--compile"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["model", "joint", "sharded"])
def test_torchrun(recipe):
    script = str(EXAMPLES / "train_torchrun.py")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert _all_learned(_run(*launch, script, "--recipe", recipe))


@pytest.mark.slow
@pytest.mark.parametrize("launch", [(), ("--cpu", "--num_processes", "2", "--mixed_precision", "bf16")])
def test_accelerate(launch):
    pytest.importorskip("accelerate")
    script = str(EXAMPLES / "train_accelerate.py")
    assert _all_learned(_run("-m", "accelerate.commands.launch", *(launch or ("--cpu",)), script))
