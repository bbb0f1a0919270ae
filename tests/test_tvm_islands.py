"""Float operators between integers on x86: equal to torch, or refused with the layer's name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from amx import FLAGS
from onnx_networks import conv, network, prepare
from test_onnx_float import OWN, Function
from torch import nn
from torch.nn import functional

import qcompile
from qcompile.errors import LoweringError

pytest.importorskip("tvm")
pytestmark = pytest.mark.skipif(
    "avx2" not in FLAGS or shutil.which("gcc") is None, reason="needs a processor with AVX2, and gcc"
)

EQUAL: dict[str, Callable[[Any], Any]] = {
    "difference with a factor": lambda x: torch.sub(torch.tanh(x), torch.abs(x), alpha=0.5),
    "sum with a factor": lambda x: torch.add(torch.tanh(x), 2.0, alpha=3),
    "layer norm of a large mean": lambda x: functional.layer_norm(torch.tanh(x) + 1, (12,)) * x,
    "group norm": lambda x: functional.group_norm(torch.tanh(x) + 1, 4) * x,
    "instance norm": lambda x: functional.instance_norm(torch.tanh(x) + 1) * x,
    "variance": lambda x: x / (torch.tanh(x).var((2, 3), keepdim=True) + 1),
    "comparison": lambda x: (torch.tanh(x) > 0.2).float() * x,
    "pooling over dilated windows": lambda x: functional.max_pool2d(torch.tanh(x), 3, 2, 1, 2),
    "interpolation": lambda x: functional.interpolate(torch.tanh(x), scale_factor=2),
}

#: Operators that TVM imports wrongly or not at all.
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "rsub": (lambda x: torch.rsub(torch.tanh(x), x, alpha=2), "something else than torch"),
    "avg_pool2d": (
        lambda x: functional.avg_pool2d(torch.tanh(x), 3, 2, 1, divisor_override=5),
        "something else than torch",
    ),
    "cumsum": (lambda x: torch.cumsum(torch.tanh(x), 1), "no machine code"),
    "amax": (lambda x: torch.tanh(x) + x.amax((2, 3), keepdim=True), "cannot compile"),
}


def lowered(island: Callable[[], nn.Module]) -> tuple[Any, Any, Any]:
    """A network around an island, its inputs, and the executable for AVX2."""
    model, x = prepare(lambda: network(conv(8, 16), island()), ((3, 12, 12),), (2,))
    return model, x, qcompile.lower(model, "x86", bits=2, batch=len(x[0]), threads=1, features=("avx2",))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(one, marks=pytest.mark.slow) if one in ("group norm", "instance norm") else one
        for one in EQUAL
    ],
)
def test_islands_equal_torch(name: str) -> None:
    model, x, compiled = lowered(lambda: Function(EQUAL[name]))
    with torch.no_grad():
        expected = model(*x)
    torch.testing.assert_close(compiled(*x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", [one for one in OWN if one != "layer norm"])  # its mean over pixels is 0
def test_common_islands_equal_torch(name: str) -> None:
    model, x, compiled = lowered(OWN[name])
    with torch.no_grad():
        expected = model(*x)
    torch.testing.assert_close(compiled(*x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", REFUSED)
def test_operators_that_tvm_computes_differently_are_refused(name: str) -> None:
    function, reason = REFUSED[name]
    with pytest.raises(LoweringError, match=f"layer '{name}.*{reason}.*lower to onnx-qdq"):
        lowered(lambda: Function(function))
