"""What ONNX Runtime computes from a lowered model, against the integer graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx_networks import NETWORKS, lowered, prepare, prepared
from torch import Tensor, fx, nn

import qcompile
from qcompile.backends.onnx import matrix
from qcompile.backends.onnx.executable import OnnxExecutable
from qcompile.backends.target import Trace

CASES = [(name, bits, mode) for name in NETWORKS for bits, mode in (((2, 3, 4), 2), ((2, 3, 4), 4))]
CASES += [
    (name, (2, 4, 8), mode) for name in ("plain", "residual", "grouped sums", "signed") for mode in (2, 4, 8)
]
CASES += [("residual", (2, 3, 4), 3), ("linear", (2, 4, 8), 2)]


def reference(executable: OnnxExecutable, trace: Trace, x: tuple[Tensor, ...]) -> dict[str, Any]:
    """Every node's normative value, computed from the values of its inputs that the runtime had."""
    values: dict[str, Any] = {}
    interpreter = _FedInterpreter(executable.request.model, trace, values)
    with torch.no_grad():
        interpreter.run(*x)
    return values


class _FedInterpreter(fx.Interpreter):
    """Replaces the value of a node by the traced one, after recording what it should be."""

    def __init__(self, model: fx.GraphModule, trace: Trace, values: dict[str, Any]) -> None:
        super().__init__(model, garbage_collect_values=False)
        self.trace, self.values = trace, values

    def run_node(self, n: fx.Node) -> Any:
        self.values[n.name] = result = super().run_node(n)
        traced = self.trace.values.get(n.name)
        if traced is None:
            return result
        return torch.from_numpy(np.rint(traced)).to(result.dtype)


def magnitude(executable: OnnxExecutable, node: fx.Node, trace: Trace) -> NDArray[np.float64]:
    """Sum of the absolute summands of a requantisation, and its value before rounding, in output units."""
    total: Any = 0.0
    inputs, multipliers, constant, shift = node.args[:4]
    for one, multiplier in zip(inputs, multipliers, strict=True):
        factor = executable.request.model.constant(multiplier).double().numpy()
        total = total + np.abs(trace.values[one.name] * factor)
    return (total + np.abs(executable.request.model.constant(constant).double().numpy())) * 2.0**-shift


def check_requantised(executable: OnnxExecutable, node: fx.Node, expected: NDArray[Any], trace: Trace) -> int:
    """Codes differ by at most one, and only within the stated error of a boundary; returns how many do."""
    actual = trace.values[node.name]
    bound = executable.rounding_error(node.name, magnitude(executable, node, trace))
    if node.args[5] - node.args[4] > 255:
        # half a step for the integer, and one of every summand, which was rounded to feed the reference
        assert (np.abs(actual - expected) <= bound + 1.0 + len(node.args[0])).all()
        return 0
    total: Any = executable.request.model.constant(node.args[2]).double().numpy()
    for one, multiplier in zip(node.args[0], node.args[1], strict=True):
        total = (
            total + trace.values[one.name] * executable.request.model.constant(multiplier).double().numpy()
        )
    real = np.broadcast_to(total * 2.0 ** -node.args[3], expected.shape)
    different = actual != expected
    assert (np.abs(actual - expected) <= 1).all()
    boundary = np.maximum(actual, expected)
    distance = np.abs(real - boundary)
    assert (distance[different] <= np.broadcast_to(bound, expected.shape)[different]).all()
    return int(different.sum())


@pytest.mark.parametrize(("name", "bits", "mode"), CASES)
def test_layers_equal_the_integer_graph(name: str, bits: tuple[int, ...], mode: int) -> None:
    model, x = prepared(name, bits)
    executable = lowered(model, mode)
    trace = executable.trace([one.numpy() for one in x])
    expected = reference(executable, trace, x)
    flips, compared = 0, 0
    for node in executable.request.model.graph.nodes:
        operator = executable.request.model.operator_name(node)
        if node.name not in trace.values:
            continue
        wanted, actual = expected[node.name].numpy(), trace.values[node.name]
        if operator.startswith("accumulate"):
            assert actual.dtype.kind == "i"
            assert np.array_equal(actual, wanted)
        elif operator == "requantize":
            flips += check_requantised(executable, node, wanted, trace)
            compared += wanted.size
        elif operator == "max_pool":
            assert np.array_equal(np.rint(actual), wanted)
    assert compared
    assert flips <= (0 if max(bits) <= 4 else compared // 100)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_integer_tensor_is_traced(name: str) -> None:
    model, x = prepared(name)
    executable = lowered(model, 3)
    graph = executable.request.model
    wanted = {
        node.name
        for node in graph.graph.nodes
        if graph.operator_name(node) in ("requantize", "quantize", "max_pool", "sum_pool")
        or graph.operator_name(node).startswith("accumulate")
    }
    assert wanted <= set(executable.trace([one.numpy() for one in x]).values)


@pytest.mark.parametrize(("name", "bits", "mode"), CASES)
def test_tapping_changes_nothing(name: str, bits: tuple[int, ...], mode: int) -> None:
    model, x = prepared(name, bits)
    executable = lowered(model, mode)
    inputs = [one.numpy() for one in x]
    for tapped, plain in zip(executable.trace(inputs).outputs, executable.run(inputs), strict=True):
        assert tapped.tobytes() == plain.tobytes()


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_equal_the_eval_model(name: str) -> None:
    model, x = prepared(name)
    for mode in model.prepared_modes:
        with torch.no_grad(), qcompile.bits(model, mode):
            expected = torch.utils._pytree.tree_leaves(model(*x))
        actual = torch.utils._pytree.tree_leaves(lowered(model, mode)(*x))
        for want, have in zip(expected, actual, strict=True):
            assert have.dtype == want.dtype
            # no code of these inputs lies within float rounding of a boundary
            torch.testing.assert_close(have, want, rtol=0.0, atol=1e-5 * float(want.abs().max()))


def test_large_layers_are_convolved_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "LARGEST_MATRIX", 1000)
    model, x = prepared("residual")
    executable = lowered(model, 4)
    assert not [node for node in executable.model.graph.node if node.op_type == "MatMulInteger"]
    trace = executable.trace([one.numpy() for one in x])
    expected = reference(executable, trace, x)
    sums = [name for name in trace.values if name.endswith("accumulate")]
    assert sums
    for name in sums:
        assert np.array_equal(trace.values[name], expected[name].numpy())
    with torch.no_grad(), qcompile.bits(model, 4):
        torch.testing.assert_close(executable(*x), model(*x), rtol=0.0, atol=1e-5)


def test_channels_without_a_multiplier_hold_their_constant() -> None:
    def build() -> nn.Module:
        layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        return nn.Sequential(*layers, nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(128, 3))

    model, x = prepare(build, ((3, 8, 8),), (2, 4))
    batch_norm = model.get_submodule("3")
    with torch.no_grad():
        batch_norm.weight[:, ::2] = 0.0
        batch_norm.bias[:, ::2] = 0.7
    for mode in model.prepared_modes:
        executable = lowered(model, mode)
        trace = executable.trace([one.numpy() for one in x])
        expected = reference(executable, trace, x)
        for name, value in trace.values.items():
            if value.dtype.kind == "i":
                assert np.array_equal(value, expected[name].numpy()), name


def test_one_accumulator_for_two_quantisers_is_fused_twice() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3)
            self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(torch.relu(self.stem(x)))
            return self.head((self.left(torch.relu(x)) + self.right(torch.tanh(x))).mean((2, 3)))

    model, x = prepare(Fork, ((3, 8, 8),), (3,))
    executable = lowered(model, 3)
    with torch.no_grad():
        torch.testing.assert_close(executable(*x), model(*x), rtol=1e-5, atol=1e-6)


def test_a_batch_of_another_size_is_lowered_too() -> None:
    model, x = prepared("residual")
    executable = lowered(model, 2, batch=1)
    with torch.no_grad(), qcompile.bits(model, 2):
        expected = model(*x)
    parts = [executable(x[0][index : index + 1]) for index in range(3)]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-5, atol=1e-6)
