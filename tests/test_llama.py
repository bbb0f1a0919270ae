"""The decoder of `benchmarks/llama_decode.py`, small: from one file the same tokens and exact integers."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from amx import FLAGS

import qcompile
from qcompile.model import QuantModel
from qcompile.passes.schemes.vertical import VerticalConfig

spec = importlib.util.spec_from_file_location("llama", Path(__file__).parents[1] / "benchmarks" / "llama.py")
assert spec is not None
assert spec.loader is not None
llama = importlib.util.module_from_spec(spec)
sys.modules["llama"] = llama
spec.loader.exec_module(llama)

SHAPE = llama.Shape(width=48, layers=2, heads=4, shared=2, hidden=80, words=50, length=11)
STEPS = 3
MODES = ("w2a8", "w8a8")


@pytest.fixture(scope="module")
def prepared() -> QuantModel:
    torch.manual_seed(0)
    network = llama.Llama(SHAPE).eval()
    _, calls = llama.decode(network, SHAPE, 5)
    config = VerticalConfig(weight_step="channel", first_last=8)
    model = qcompile.prepare(network, calls[1], modes=MODES, config=config)
    qcompile.calibrate(model, [(*call, torch.zeros(1)) for call in calls])  # what follows is no input
    return model.eval()


def logged(run: Any) -> tuple[list[int], list[Any], list[Any]]:
    """Tokens, all outputs of all steps, and the arguments of the calls."""
    outputs: list[Any] = []

    def recording(*args: Any) -> Any:
        outputs.append(run(*args))
        return outputs[-1]

    tokens, calls = llama.decode(recording, SHAPE, STEPS)
    return tokens, outputs, calls


def test_a_token_sees_those_before_it_and_no_others() -> None:
    """What the caches hold behind the position does not matter, what they hold before it does."""
    torch.manual_seed(1)
    network = llama.Llama(SHAPE).eval()
    _, calls = llama.decode(network, SHAPE, 4)
    tokens, position, keys, values = calls[-1]

    def logits(place: int) -> Any:
        changed = [[one.clone() for one in cache] for cache in (keys, values)]
        for one in (*changed[0], *changed[1]):
            one[:, :, place] += 1
        with torch.no_grad():
            return network(tokens, position, *map(tuple, changed))[0]

    with torch.no_grad():
        expected = network(*calls[-1])[0]
    assert torch.equal(logits(int(position)), expected)
    assert torch.equal(logits(int(position) + 1), expected)
    assert not torch.allclose(logits(int(position) - 1), expected, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_a_file_decodes_bit_for_bit_what_eval_mode_decodes(
    prepared: QuantModel, mode: str, tmp_path: Path
) -> None:
    qcompile.save(prepared, tmp_path / "llama.qcm")
    tokens, outputs, calls = logged(qcompile.at(prepared, mode))
    found, again, _ = logged(qcompile.load(tmp_path / "llama.qcm", bits=mode))
    assert found == tokens
    for want, have in zip(outputs, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(want, have, strict=True))
    assert qcompile.verify(prepared, calls[-1], bits=mode).exact


@pytest.mark.slow
@pytest.mark.skipif("avx2" not in FLAGS or shutil.which("gcc") is None, reason="needs AVX2, and gcc")
@pytest.mark.parametrize("mode", MODES)
def test_machine_code_decodes_the_same(prepared: QuantModel, mode: str) -> None:
    pytest.importorskip("tvm")
    kind = "vnni" if "avx512_vnni" in FLAGS else "avx2"
    compiled = qcompile.lower(prepared, "x86", bits=mode, batch=1, threads=1, features=(kind,))
    tokens, outputs, calls = logged(qcompile.at(prepared, mode))
    found, again, _ = logged(compiled)
    assert found == tokens
    for want, have in zip(outputs, again, strict=True):
        for a, b in zip(want, have, strict=True):
            # softmax and normalisation are float and round differently
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(a.abs().max()))
    report = qcompile.verify(prepared, calls[-1], bits=mode, target=compiled)
    assert report.exact, report
