"""Where quantisers go, and which layers stay in float."""

from __future__ import annotations

import pytest
import torch
from nets import example
from torch import Tensor, nn
from torch.nn import functional

import qcompile
from qcompile.errors import InvalidArgument
from qcompile.model import QuantModel
from qcompile.passes.capture import capture
from qcompile.passes.first_last import first_and_last


def _calls(prepared: QuantModel) -> list[str]:
    return [str(node.target) for node in prepared.graph.nodes if node.op == "call_module"]


def test_graph_of_a_residual_network():
    model, x = example("residual")
    prepared = qcompile.prepare(model, x)
    assert _calls(prepared) == [
        "stem", "bn0", "conv1.input_quantizer", "conv1", "bn1", "conv2.input_quantizer", "conv2", "bn2",
        "down", "bn3", "conv3.input_quantizer", "conv3", "bn4", "head",
    ]  # fmt: skip


def test_layers_that_read_one_tensor_share_its_quantizer():
    model, x = example("residual")
    prepared = qcompile.prepare(model, x)
    nodes = {str(node.target): node for node in prepared.graph.nodes}
    assert nodes["conv1"].args[0] is nodes["down"].args[0] is nodes["conv1.input_quantizer"]


def test_quantizers_move_before_pooling_padding_and_flattening():
    model, x = example("plain")
    prepared = qcompile.prepare(model, x)
    order = [str(node.target) for node in prepared.graph.nodes if node.op.startswith("call")]
    relu, pool = "aten.relu.default", "aten.max_pool2d.default"
    assert order == [
        "conv1", relu, "conv2.input_quantizer", pool, "conv2", relu, "fc1.input_quantizer", pool,
        "aten.flatten.using_ints", "fc1", relu, "fc2",
    ]  # fmt: skip


def test_signs_follow_the_graph():
    model, x = example("mobile")
    prepared = qcompile.prepare(model, x)
    signed = {n: m.signed for n, m in prepared.named_modules() if hasattr(m, "signed")}
    assert signed == {
        "expand.0.input_quantizer": False,
        "depth.0.input_quantizer": False,
        "project.0.input_quantizer": False,
        "last.0.input_quantizer": True,  # the linear bottleneck
    }


class TwoHeads(nn.Module):
    """Two inputs, two outputs: several first and last layers. The names say nothing of the order."""

    def __init__(self) -> None:
        super().__init__()
        self.z_first, self.a_first = nn.Linear(3, 4), nn.Linear(2, 4)
        self.m = nn.Linear(4, 4)
        self.b_last, self.c_last = nn.Linear(4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        h = functional.relu(self.z_first(x) + self.a_first(y))
        h = functional.relu(self.m(h))
        return {"b": self.b_last(h), "c": self.c_last(h)}


def test_first_and_last_come_from_the_data_flow():
    captured = capture(TwoHeads(), (torch.randn(4, 3), torch.randn(4, 2)))
    first, last = first_and_last(captured.graph_module)
    assert first == {"z_first", "a_first"}
    assert last == {"b_last", "c_last"}


def test_several_inputs_and_outputs_run_in_every_form(tmp_path):
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    prepared = qcompile.prepare(TwoHeads(), (x, y)).train()
    prepared(x, y=y)
    qcompile.calibrate(prepared, [(x, y)])
    prepared.eval()
    expected = prepared(x, y)
    assert set(expected) == {"b", "c"}
    qcompile.save(prepared, tmp_path / "m.qcm")
    found = qcompile.load(tmp_path / "m.qcm")(x=x, y=y)
    assert torch.equal(found["b"], expected["b"])
    assert torch.equal(found["c"], expected["c"])


class Shared(nn.Module):
    """One layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        x = functional.relu(self.body(x))
        x = functional.relu(self.body(x) * 2.0)
        return self.head(x.mean((2, 3)))


def test_a_shared_layer_has_one_weight_and_a_quantizer_per_input():
    x = torch.randn(2, 1, 8, 8)
    prepared = qcompile.prepare(Shared(), x)
    qcompile.calibrate(prepared, [x])
    assert _calls(prepared).count("body") == 2
    assert {"body.input_quantizer", "body.input_quantizer_1"} <= set(_calls(prepared))
    prepared.eval()
    constants = prepared.integer_model(prepared.active).constants()
    assert [name for name in constants if name.endswith("weight_codes")] == ["body.weight_codes"]


def test_input_shapes_that_do_not_fit_are_one_line():
    model, x = example("residual")
    prepared = qcompile.prepare(model, x)
    qcompile.calibrate(prepared, [x])
    with pytest.raises(InvalidArgument, match=r"does not run on inputs of shape \(1, 4, 12, 12\)"):
        qcompile.lower(prepared.eval(), "onnx-qdq", input_shapes=[(4, 12, 12)])


class _Gated(nn.Module):
    """A linear layer reads one vector, without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.gate = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.middle(torch.relu(self.stem(x))))
        gate = torch.sigmoid(self.gate(x.mean((0, 2, 3))))
        return self.head(x.mean((2, 3)) * gate)


def test_linear_layers_train_on_one_vector():
    x = torch.randn(4, 3, 8, 8)
    model = qcompile.prepare(_Gated(), x, bits=(2, 8)).train()
    qcompile.JointLoss(model, nn.CrossEntropyLoss()).backward(x, torch.tensor([0, 1, 0, 1]))
    layer = model.get_submodule("gate")
    assert layer.weight.grad.shape == (8, 8)
    assert layer.weight.grad.abs().sum() > 0
    # at 8 bits nearly that of the float layer
    with qcompile.bits(model, 8):
        model.zero_grad()
        model(x).square().sum().backward()
    reference = _Gated()
    reference.load_state_dict(qcompile.float_state_dict(model, 8))
    reference(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, reference.gate.weight.grad, rtol=0.2, atol=0.05)
