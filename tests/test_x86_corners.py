"""Models at the edges of the target x86: unusual outputs, clips, layouts, arguments, and processes."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from amx import FLAGS
from torch import Tensor, nn
from torch.nn import functional

import qcompile
from qcompile.errors import InvalidArgument, InvalidInputType
from qcompile.model import QuantModel

pytest.importorskip("tvm")
pytestmark = pytest.mark.skipif(
    "avx2" not in FLAGS or shutil.which("gcc") is None, reason="needs a processor with AVX2, and gcc"
)


class Network(nn.Module):
    """A float stem, what is tested, a float head; `body` names its layers."""

    def __init__(self, forward: Callable[..., Any], **body: nn.Module) -> None:
        super().__init__()
        self.body, self._forward = nn.ModuleDict(body), forward
        self.register_buffer("table", torch.arange(12.0).reshape(1, 12, 1, 1) / 6)

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, self.body, x)


def conv(inputs: int = 6, outputs: int = 6) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def prepared(model: nn.Module, x: Tensor, bits: tuple[int, ...] = (2, 4)) -> QuantModel:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.4, 0.4)
    result = qcompile.prepare(model.eval(), x, bits=bits)
    qcompile.calibrate(result, [x])
    return result.eval()


def check(model: nn.Module, x: Tensor, bits: int = 2) -> Any:
    """Lower for AVX2 and compare with eval mode; returns the executable."""
    quantised = prepared(model, x)
    run = qcompile.lower(quantised, "x86", bits=bits, batch=len(x), features=("avx2",), threads=2)
    expected, found = qcompile.at(quantised, bits)(x), run(x)
    for want, have in zip(
        *(one if isinstance(one, tuple) else (one,) for one in (expected, found)), strict=True
    ):
        torch.testing.assert_close(have, want, rtol=0, atol=1e-5 * float(want.double().abs().max()))
    return run


def test_outputs_may_repeat_and_be_inputs_and_constants() -> None:
    def forward(self: Any, body: Any, x: Tensor) -> Any:
        y = body["head"](body["a"](body["stem"](x).relu()).relu())
        return y, x, y, self.table, y + 1

    check(Network(forward, stem=conv(3), a=conv(), head=conv()), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(("low", "high"), [(0.7, 6.0), (-3.0, -0.5), (0.0, 6.0)])
def test_clips_that_exclude_zero_leave_the_channels_that_pad_alone(low: float, high: float) -> None:
    def forward(self: Any, body: Any, x: Tensor) -> Tensor:
        y = functional.hardtanh(body["a"](body["stem"](x).relu()), low, high)
        return body["head"](body["b"](y).relu())

    check(Network(forward, stem=conv(3), a=conv(), b=conv(), head=conv()), torch.randn(2, 3, 8, 8))


def test_channels_first_and_last_are_not_mixed_where_their_extents_agree() -> None:
    def forward(self: Any, body: Any, x: Tensor) -> Tensor:
        x = body["stem"](x).relu()
        return body["head"](torch.sigmoid(body["rows"](x)) * torch.tanh(body["columns"](x)))

    network = Network(
        forward,
        stem=nn.Conv1d(3, 16, 1),
        columns=nn.Conv1d(16, 16, 1),
        rows=nn.Linear(16, 16),
        head=nn.Linear(16, 3),
    )
    check(network, torch.randn(1, 3, 16))


def test_a_factor_of_a_sum_behind_a_float_convolution_counts() -> None:
    def forward(self: Any, body: Any, x: Tensor) -> Tensor:
        y = torch.add(body["stem"](x) * self.table[:, 6:], self.table[:, :6], alpha=3)
        return body["head"](body["a"](functional.gelu(y)).relu())

    check(Network(forward, stem=conv(3), a=conv(), head=conv()), torch.randn(2, 3, 8, 8))


@pytest.mark.slow
def test_what_differs_in_scale_along_other_dimensions_than_channels_is_joined_and_added() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b, self.head = (nn.Linear(12, 12) for _ in range(4))

        def forward(self, x: Tensor) -> Any:
            x = self.stem(x).relu()
            y, z = (one.unflatten(-1, (3, 1, 4)) for one in (self.a(x), 3 * self.b(x)))
            both = torch.cat((y, z), 2)
            return both, self.head((both + y).flatten(1)[:, :12])

    check(Rows(), torch.randn(2, 12))


def test_large_constants_are_where_kernels_read_them() -> None:
    """More than two huge pages, the last one not full."""

    def forward(self: Any, body: Any, x: Tensor) -> Tensor:
        return body["head"](body["a"](body["stem"](x).relu()).relu())

    layers = {"stem": nn.Linear(4, 1024), "a": nn.Linear(1024, 4700), "head": nn.Linear(4700, 2)}
    x = torch.randn(1, 4)
    model = prepared(Network(forward, **layers), x, bits=(8,))
    run = qcompile.lower(model, "x86", bits=8, batch=1, features=("avx2",))
    content = (run.artefact.folder / "constants.bin").read_bytes()
    assert len(content) > 2**22
    assert run.library.constants() == content
    torch.testing.assert_close(run(x), model(x), rtol=0, atol=1e-5 * float(model(x).detach().abs().max()))


def test_sums_over_everything() -> None:
    def forward(self: Any, body: Any, x: Tensor) -> Any:
        y = body["a"](body["stem"](x).relu())
        return body["head"](y.relu()), y.sum()

    check(Network(forward, stem=conv(3), a=conv(), head=conv()), torch.randn(2, 3, 8, 8))


def test_sequences_that_are_joined_keep_their_channels() -> None:
    def forward(self: Any, body: Any, x: Tensor) -> Tensor:
        x = body["stem"](x).relu()
        y = torch.cat([body["a"](x), body["b"](x)], 1)
        return body["head"](torch.sigmoid(y).mean(2))

    layers = {"stem": nn.Conv1d(3, 8, 1), "a": nn.Conv1d(8, 8, 1), "b": nn.Conv1d(8, 8, 1)}
    check(Network(forward, **layers, head=nn.Linear(16, 3)), torch.randn(2, 3, 10))


def test_tables_of_one_entry() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.a, self.b = nn.Embedding(1, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.b(self.a(self.stem(self.table(tokens)).relu()).relu()).relu())

    check(Words(), torch.zeros(2, 5, dtype=torch.int64))


@pytest.fixture(scope="module")
def simple() -> tuple[QuantModel, Tensor]:
    def forward(self: Any, body: Any, x: Tensor) -> Any:
        y = body["head"](body["a"](body["stem"](x).relu()).relu())
        return y, y.mean()

    x = torch.randn(2, 3, 8, 8)
    return prepared(Network(forward, stem=conv(3), a=conv(), head=conv()), x), x


def test_chunks_need_a_batch_in_every_output(simple: tuple[QuantModel, Tensor]) -> None:
    run = qcompile.lower(simple[0], "x86", bits=2, batch=2, features=("avx2",), chunk=True)
    with pytest.raises(InvalidArgument, match="output 1 of shape"):
        run(torch.randn(5, 3, 8, 8))


def test_models_run_in_a_process_that_was_forked(simple: tuple[QuantModel, Tensor]) -> None:
    model, x = simple
    run = qcompile.lower(model, "x86", bits=2, batch=2, features=("avx2",), threads=2)
    run(x)
    child = os.fork()
    if child == 0:
        run(x)
        os._exit(7)
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 7


def test_a_cpu_is_served_by_the_kind_that_it_belongs_to(simple: tuple[QuantModel, Tensor]) -> None:
    model, x = simple
    run = qcompile.lower(model, "x86", bits=2, batch=2, cpu="bdver4")
    assert any("avx2" in one["kernel"] for one in run.kernels())
    run(x)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"features": 5}, InvalidInputType),
        ({"features": "avx2"}, InvalidInputType),
        ({"features": ()}, InvalidArgument),
        ({"cpu": 5}, InvalidInputType),
        ({"input_shapes": ((3, -1, 8),)}, InvalidArgument),
    ],
)
def test_bad_arguments_are_named(
    simple: tuple[QuantModel, Tensor], options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match=next(iter(options))):
        qcompile.lower(simple[0], "x86", bits=2, **options)
