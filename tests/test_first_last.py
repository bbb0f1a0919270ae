"""First and last layers at 8 bits in every mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nets import trained
from torch import Tensor, nn

import qcompile
from qcompile.costs import layer_costs
from qcompile.errors import InvalidArgument
from qcompile.file.container import Container
from qcompile.model import QuantModel
from qcompile.passes.layers import QuantizedLayer
from qcompile.passes.quantizers import ActivationQuantizer
from qcompile.passes.schemes.vertical import VerticalConfig


def _trained(bits: tuple[int | str, ...] = (2, 4)) -> tuple[QuantModel, Tensor]:
    return trained("residual", bits=bits, config=VerticalConfig(first_last=8))


@pytest.mark.parametrize("target", [None, "onnx-qdq", "onnx-packed", "x86"])
def test_they_are_exact(target: str | None) -> None:
    ready, x = _trained()
    assert all(one.quantized for one in ready.records)
    for bits in (2, 4):
        given = {} if target is None else {"target": target}
        assert qcompile.verify(ready, x, bits=bits, **given).exact


def test_all_modes_share_their_planes(tmp_path: Path) -> None:
    ready, x = _trained()
    names = {one.reason.rpartition(" as ")[2]: one.name for one in ready.records if " as " in one.reason}
    assert set(names) == {"first weighted layer", "last weighted layer"}
    costs = {bits: layer_costs(qcompile.convert(ready, bits=bits), [x.shape]) for bits in (2, 4)}
    for bits, listed in costs.items():
        for one in listed:
            wanted = 8 if one.name in names.values() else bits
            assert (one.weight_bits, one.activation_bits) == (wanted, wanted)
    path = tmp_path / "model.qcm"
    qcompile.save(ready, path)
    for bits in (2, 4):
        assert torch.equal(qcompile.load(path, bits=bits)(x), qcompile.at(ready, bits)(x))
    middle = sum(one.weight_bytes for one in costs[2]) - sum(
        one.weight_bytes for one in costs[2] if one.name in names.values()
    )
    with Container.open(path) as container:
        planes = [one.length for one in container.sections if one.name.startswith("planes:")]
    assert planes == [sum(one.weight_bytes for one in costs[2]), middle]


def test_modes_for_weights_only_take_them_in_float() -> None:
    ready, x = _trained(("w4", "w8"))
    for bits in ("w4", "w8"):
        assert qcompile.verify(ready, x, bits=bits).exact
    layers = [node.meta["layer"] for node, _ in qcompile.convert(ready, bits="w4").weights()]
    assert len(layers) == len(ready.records)


def test_a_tensor_that_both_kinds_read_is_rounded_twice() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.middle, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.other = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.stem(x).relu()
            return self.last(self.middle(x).relu()), self.other(x)

    x = torch.randn(8, 4)
    ready = qcompile.prepare(Fork().eval(), x, bits=(2, 4), config=VerticalConfig(first_last=8))
    qcompile.calibrate(ready, [x])
    ready.eval()
    quantizers = [one for one in ready.modules() if isinstance(one, ActivationQuantizer)]
    inputs = {one.layers: one.bits for one in quantizers}
    assert inputs == {("stem",): (8, 8), ("middle",): (2, 4), ("other",): (8, 8), ("last",): (8, 8)}
    layers = {name: one for name, one in ready.named_modules() if isinstance(one, QuantizedLayer)}
    assert {name: one.weight_quantizer.bits[0] for name, one in layers.items()} == {
        "stem": 8,
        "middle": 2,
        "last": 8,
        "other": 8,
    }
    assert qcompile.verify(ready, x, bits=2).exact


def test_a_layer_may_read_a_table() -> None:
    class Table(nn.Module):
        """Biases that a layer makes of coordinates."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("places", torch.randn(6, 2))
            self.stem, self.bias, self.last = nn.Linear(4, 6), nn.Linear(2, 1), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.stem(x) + self.bias(self.places).squeeze(1))

    x = torch.randn(8, 4)
    ready = qcompile.prepare(Table().eval(), x, bits=(2, 4), config=VerticalConfig(first_last=8))
    qcompile.calibrate(ready, [x])
    assert qcompile.verify(ready.eval(), x, bits=2).exact


def test_the_option_lists_its_choices() -> None:
    with pytest.raises(InvalidArgument, match="first_last=4 is not one of 'float', 8"):
        VerticalConfig(first_last=4)
