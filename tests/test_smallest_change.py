"""Errors of capture show the smallest change; what they show is applied, and then the model is captured."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.capturable_parts import capturable_parts
from qcompile.errors import CaptureError
from qcompile.passes.capture import capture

torch.set_num_threads(1)

HEADER = """
import numpy as np
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())])
        self.table = nn.Parameter(torch.randn(1, 4))
        self.flag = True

    def forward(self, x):
"""

# (body of forward, batch of the example); the error shows code that can replace the line
REWRITTEN: dict[str, tuple[str, int]] = {
    "if": ("y = self.body(x)\nif y.sum() > 0:\n    y = y * 2\nreturn y", 2),
    "if with an in-place operator": ("y = self.body(x)\nif y.sum() > 0:\n    y += 2\nreturn y", 2),
    "if and else": ("if x.sum() > 0:\n    y = x * 2\nelse:\n    y = -x\nreturn self.body(y)", 2),
    "if that returns": ("y = self.body(x)\nif y.sum() > 0:\n    return y\nreturn -y", 2),
    "if that returns, and else": ("if x.sum() > 0:\n    return self.body(x)\nelse:\n    return -x", 2),
    "and, not": ("if self.flag and not x.sum() > 0:\n    x = -x\nreturn self.body(x)", 2),
    "item": ("if x.abs().max().item() > 1:\n    x = x * 2\nreturn self.body(x)", 2),
    "number made before": ("n = float(x.abs().max())\nif n > 1:\n    x = x / n\nreturn self.body(x)", 2),
    "item made before": ("n = x.abs().max().item()\nif n > 1:\n    x = x / n\nreturn self.body(x)", 2),
    "conditional expression": ("y = x if bool((x > 0).any()) else -x\nreturn self.body(y)", 2),
    "float": ("return self.body(x * float(x.abs().max()))", 2),
    "int": ("k = int(x.abs().max())\nreturn self.body(x * k)", 2),
    "numpy": ("y = torch.from_numpy(np.tanh(x.detach().cpu().numpy()))\nreturn self.body(y)", 2),
    "torch.tensor of numpy": ("y = torch.tensor(np.exp(np.asarray(x)))\nreturn self.body(y)", 2),
    "view": ("return self.body(x).view(2, -1)", 2),
    "view of a name": ("y = self.body(x)\nreturn y.view(2, 2, 2)", 2),
    "reshape by a tuple": ("return torch.reshape(self.body(x), (2, 4))", 2),
    "zeros": ("return self.body(x) + torch.zeros(2, 4)", 2),
    "expand": ("return torch.cat([self.body(x), self.table.expand(3, 4)], 1)", 3),
    "batch of one": ("return self.body(x.reshape(1, 2, 2).flatten(1)) + self.body(x).view(1, 4)", 1),
    "cond": ("return torch.cond(x.sum() > 0, lambda a: a * 2, lambda b: -b, (self.body(x),))", 2),
}


def module_of(folder: Path, source: str) -> ModuleType:
    path = folder / f"net{abs(hash(source))}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def source_of(body: str) -> str:
    return HEADER.strip() + "\n" + "".join(f"        {line}\n" for line in body.splitlines())


def net_of(folder: Path, source: str) -> nn.Module:
    net: nn.Module = module_of(folder, source).Net()
    return net


def refused(net: nn.Module, x: Tensor) -> str:
    with pytest.raises(CaptureError) as caught:
        capture(net, x)
    message = str(caught.value)
    assert "\n" not in message
    return message


def replace(source: str, number: int, code: str) -> str:
    """The source with the statement at a line replaced."""
    tree = ast.parse(source)
    statements = [one for one in ast.walk(tree) if isinstance(one, ast.stmt) and one.lineno == number]
    assert len(statements) == 1
    lines = source.splitlines()
    indent = re.match(r" *", lines[number - 1])
    assert indent is not None
    lines[number - 1 : statements[0].end_lineno] = [indent[0] + code] + [""] * (
        (statements[0].end_lineno or number) - number
    )
    return "\n".join(lines) + "\n"


def applied(source: str, message: str) -> str:
    """The source with the change that a message shows."""
    place = re.match(r"\w+\.py:(\d+)", message)
    shown = re.search(r"; (?:write|keep it a tensor:) `([^`]*)`(?:, with `([^`]*)` in line (\d+))?", message)
    assert place is not None, message
    assert shown is not None, message
    changed = replace(source, int(place[1]), shown[1])
    return replace(changed, int(shown[3]), shown[2]) if shown[2] else changed


#: Where the first change uncovers another line.
TWICE = ("number made before",)


@pytest.mark.parametrize("case", REWRITTEN)
def test_the_change_that_is_shown_makes_the_model_capturable(case: str, tmp_path: Path) -> None:
    body, batch = REWRITTEN[case]
    source = source_of(body)
    x = torch.randn(batch, 4, generator=torch.Generator().manual_seed(1)).abs() + 1
    changed = applied(source, refused(net_of(tmp_path, source), x))
    if case in TWICE:
        changed = applied(changed, refused(net_of(tmp_path, changed), x))
    new = net_of(tmp_path, changed)
    captured = capture(new, x)
    if case != "int":  # which cuts off what is behind the point
        torch.testing.assert_close(new(x), net_of(tmp_path, source)(x))
    for inputs in (x, -x, torch.cat([x, -x, x])):
        torch.testing.assert_close(captured.graph_module(inputs)[0], new(inputs))


ADVISED = {
    "assert": (
        "assert torch.isfinite(x).all(), 'bad'\nreturn self.body(x)",
        "delete the assert, or put it below",
    ),
    "text": ("self.last = f'{x.mean():.2f}'\nreturn self.body(x)", "delete this line, or put it below"),
    "while": ("while x.abs().max() > 9:\n    x = x / 2\nreturn self.body(x)", "loop a fixed number of times"),
    "size": ("n = int(x.abs().max())\nreturn self.body(x)[:, :n]", "a size cannot depend on values"),
    "long if": (
        "if x.sum() > 0:\n    x = x * 2\n    x = x + 1\nreturn self.body(x)",
        "compute both cases and choose: `torch.where(x.sum() > 0, ..., ...)`",
    ),
    "unknown numpy": ("return self.body(torch.tensor(np.fft.fft(x.numpy()).real))", "use functions of torch"),
    "loop over the batch": (
        "return torch.stack([self.body(one) for one in x])",
        "call the layers once, on all samples together",
    ),
    "if on the batch": (
        "if x.shape[0] == 2:\n    x = -x\nreturn self.body(x)",
        "do the same for every size",
    ),
    "autocast": (
        "with torch.autocast('cpu', dtype=torch.bfloat16):\n    y = self.body(x)\nreturn y",
        "delete `with torch.autocast('cpu', dtype=torch.bfloat16):` (line 15) and put it around the call",
    ),
}


@pytest.mark.parametrize("case", ADVISED)
def test_advice_where_no_line_can_be_shown(case: str, tmp_path: Path) -> None:
    body, advice = ADVISED[case]
    assert advice in refused(net_of(tmp_path, source_of(body)), torch.randn(2, 4))


@pytest.mark.parametrize("case", ["assert", "text"])
def test_what_is_put_below_the_condition_is_captured(case: str, tmp_path: Path) -> None:
    first, _, rest = ADVISED[case][0].partition("\n")
    body = f"if not torch.compiler.is_exporting():\n    {first}\n{rest}"
    net, x = net_of(tmp_path, source_of(body)), torch.randn(2, 4)
    torch.testing.assert_close(capture(net, x).graph_module(x)[0], net(x))


def test_source_that_cannot_be_read_gives_the_general_advice() -> None:
    source = source_of("if x.sum() > 0:\n    x = -x\nreturn self.body(x)")
    namespace: dict[str, Any] = {"__name__": "nowhere"}
    exec(compile(source, "nowhere.py", "exec"), namespace)
    assert "rewrite it with torch.where" in refused(namespace["Net"](), torch.randn(2, 4))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.norm = nn.LayerNorm(4)
        self.stack = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.before(x))
        for layer in self.stack:
            if x.sum() > 0:
                x = layer(x)
                x = x + 1
        return x


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.inner = Inner()
        self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.stem(x)))


def test_the_largest_parts_that_can_be_captured_are_named() -> None:
    x = torch.randn(2, 4).abs()
    with pytest.raises(CaptureError) as caught:
        qcompile.prepare(Outer(), x)
    wanted = "submodules=['stem', 'inner.before', 'inner.stack.0', 'inner.stack.1', 'head']"
    assert str(caught.value).endswith(wanted)
    names = ["stem", "inner.before", "head"]  # the branch is not taken by every input
    assert qcompile.summary(qcompile.prepare(Outer(), x, submodules=names)).quantized_share > 0
    with pytest.raises(CaptureError, match=r"^submodule 'inner': .*'inner.before'"):
        qcompile.prepare(Outer(), x, submodules=["stem", "inner"])


def test_a_line_outside_of_all_modules_names_none() -> None:
    assert capturable_parts(Outer(), __file__, 1) == []
