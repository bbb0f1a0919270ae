"""`verify` finds the integer graphs of sound models exact, in every mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from verify_networks import NETWORKS, Dense, Pools, Residual, images, trained

import qcompile
from qcompile.passes.schemes.vertical import VerticalConfig
from qcompile.verify import verify


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "options", [{"bits": (2, 3, 4)}, {"modes": ("w1a1", "w2a4", "w4a2", "w8a8")}], ids=str
)
def test_converted_networks_are_exact(name: str, options: dict[str, Any]) -> None:
    kind, x = NETWORKS[name]
    torch.manual_seed(0)
    model = trained(kind, x, **options)
    for bits in qcompile.modes(model):
        report = verify(model, x, bits=bits)
        assert report.failures == ()
        assert report.exact
        assert report.recomputed
        assert report.mode == bits
        assert report.logits_error == 0.0
        assert report.end_to_end.untapped_equal


def test_every_integer_operator_is_compared() -> None:
    report = verify(trained(Residual, images()), images())
    kinds = {check.operator for check in report.layers}
    assert {"accumulate_conv", "accumulate_linear", "requantize", "quantize", "sum_pool"} <= kinds
    pools = verify(trained(Pools, images(6, 15)), images(6, 15))
    assert {"max_pool", "sum_pool"} <= {check.operator for check in pools.layers}
    for check in (*report.layers, *pools.layers):
        assert check.tapped
        assert check.exact
        assert check.accumulators_compared + check.codes_compared > 0
    conv = next(check for check in report.layers if check.node == "block2_conv1_accumulate")
    assert (conv.layer, conv.weight_bits) == ("block2.conv1", 4)
    assert conv.accumulators_compared == 6 * 8 * 3 * 3


def test_every_quantiser_is_compared_with_the_trained_chain() -> None:
    report = verify(trained(Dense, images()), images())
    checked = {check.layer for check in report.layers if check.fold_error is not None}
    assert checked == {f"{layer}.input_quantizer" for layer in ("conv1", "conv2", "transition")}
    assert max(check.fold_error or 0.0 for check in report.layers) < 2.0**-12


def test_without_compensation_and_with_shared_statistics() -> None:
    from qcompile.passes.schemes.vertical import VerticalConfig

    config = VerticalConfig(compensation=False, batch_norm="shared")
    model = trained(Residual, images(), config=config)
    assert all(verify(model, images(), bits=bits).exact for bits in (2, 3, 4))


def test_a_skipped_layer_stays_a_float_island() -> None:
    model = trained(Residual, images(), skip=["block1.conv2"])
    report = verify(model, images())
    assert report.exact
    assert "block1.conv2" not in {check.layer for check in report.layers}


def test_a_model_without_running_statistics_is_exact() -> None:
    class Batchwise(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.block1.bn1 = nn.BatchNorm2d(6, track_running_stats=False)

    assert verify(trained(Batchwise, images()), images()).exact


def test_a_loaded_model_is_exact(tmp_path: Path) -> None:
    model = trained(Residual, images())
    qcompile.save(model, tmp_path / "model.qcm")
    loaded = qcompile.load(tmp_path / "model.qcm")
    for bits in (2, 3, 4):
        report = verify(loaded, images(), bits=bits)
        assert report.exact
        assert not report.recomputed  # the file holds no latent weights
        assert verify(model, images(), target=qcompile.convert(loaded, bits)).exact


def test_several_inputs_and_outputs_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem1, self.stem2 = nn.Conv2d(3, 4, 3), nn.Conv2d(2, 4, 3)
            self.conv = nn.Conv2d(4, 6, 3)
            self.head = nn.Linear(6, 5)

        def forward(self, a: Tensor, b: Tensor | None = None, *, c: Tensor) -> dict[str, Any]:
            y = self.conv(torch.relu(self.stem1(a) + self.stem2(c)))
            return {"logits": self.head(y.mean((2, 3))), "parts": [y.relu(), b]}

    a, c = images(), images()[:, :2]
    model = qcompile.prepare(Two(), {"a": a, "c": c}).train()
    model(a=a, c=c)
    report = verify(model, {"c": c, "a": a})
    assert report.exact
    assert report.samples == 6


@pytest.mark.parametrize("scheme", ["vertical", "n2uq"])
@pytest.mark.parametrize(
    "between",
    [
        [nn.Upsample(scale_factor=2)],
        [nn.BatchNorm2d(8), nn.Upsample(scale_factor=(3, 1)), nn.ReLU()],
        [nn.ReLU(), nn.Upsample(scale_factor=2)],
        [nn.ReLU(), nn.Upsample(scale_factor=1.5)],
    ],
    ids=["signed codes", "wide integers", "codes", "no whole factor"],
)
def test_enlarged_integers(scheme: str, between: list[nn.Module]) -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    net = nn.Sequential(first, nn.ReLU(), second, *between, nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    x = torch.randn(2, 3, 8, 6)
    model = qcompile.prepare(net, x, scheme=scheme, bits=(2, 4))
    qcompile.calibrate(model, [x])
    for target in (None, "onnx-qdq"):
        report = qcompile.verify(model.eval(), x, bits=4, target=target)
        assert report.exact, report.failures


class NormalisedSum(nn.Module):
    """x to relu(norm(conv(x)) + norm(x)), x (N, C, H, W), after Ding et al. 2021 (RepVGG)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv_norm = nn.BatchNorm2d(channels)
        self.norm = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv_norm(self.conv(x)) + self.norm(x))


@pytest.mark.parametrize(
    ("scheme", "modes"), [("vertical", (2, 8)), pytest.param("n2uq", (2, 4), marks=pytest.mark.slow)]
)
def test_sums_whose_bounds_grow_with_the_depth(scheme: str, modes: tuple[int, ...]) -> None:
    blocks = [NormalisedSum(4) for _ in range(16)]
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *blocks, nn.Flatten(), nn.LazyLinear(3))
    for block in blocks:  # a channel without variance is multiplied with 1 / sqrt(eps)
        with torch.no_grad():
            block.conv.weight[0] = 0.0
            block.conv_norm.bias[0] = -20.0
    for one in network.modules():
        if isinstance(one, nn.BatchNorm2d):
            one.momentum = 1.0  # the statistics of one batch
    x = images(8)
    network.train()(x)
    ready = qcompile.prepare(network, x, scheme=scheme, bits=modes)
    qcompile.calibrate(ready, [x])
    for bits in modes:
        report = verify(ready.eval(), x, bits=bits)
        assert report.exact, report.failures


class ScaledSums(nn.Module):
    """Rows (N, rows, 8) through sums with scaled branches behind layer norms (Touvron et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.second, self.last, self.head = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(8, eps=1e-12) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.scale = nn.Parameter(torch.full((8,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.stem(x))
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + self.scale * layer(norm(x))
        return self.head(self.last(x))


def test_small_rows_of_a_stream_reach_layer_normalisation() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 8) * torch.tensor([1e-5, 1.0, 30.0, 1.0, 1.0]).reshape(5, 1)
    ready = qcompile.prepare(ScaledSums(), x, bits=(2, 8))
    qcompile.calibrate(ready, [x])
    for bits in (2, 8):
        report = verify(ready.eval(), x, bits=bits)
        assert report.exact, report.failures


class PooledHead(nn.Module):
    """A hidden linear layer reads the mean over a large area: integer sums of it exceed 32 bits."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.hidden, self.excite = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
        self.gated = gated

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        y = torch.relu(self.norm(self.conv(y)) + y)
        z = torch.relu(self.hidden(y.mean((2, 3))))
        if self.gated:
            gate = torch.sigmoid(self.excite(z))
            return self.head(torch.relu(self.last(y * gate[:, :, None, None])).mean((2, 3)))
        return self.head(z)


@pytest.mark.parametrize("gated", [False, True])
def test_thresholds_behind_means_over_large_areas(gated: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 56, 56) + 0.3
    model = qcompile.prepare(PooledHead(gated), x, scheme="n2uq", bits=(2, 4)).train()
    optimizer = torch.optim.SGD(qcompile.param_groups(model, lr=0.05), momentum=0.9)
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    for _ in range(3):
        optimizer.zero_grad()
        joint.backward(x, torch.arange(4) % 3)
        optimizer.step()
    graph = qcompile.convert(model.eval(), 4)
    layers = [str(node.meta.get("layer", "")) for node in graph.graph.nodes]
    assert any(one.endswith(".sum") for one in layers)  # such sums do not go to thresholds as they are
    for bits in (2, 4):
        report = qcompile.verify(model, x, bits=bits)
        assert report.exact, report.failures


class PreNormalised(nn.Module):
    """(N, 6, 8) through residual sums, behind batch normalisation; the last layer reads the sum itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 5)
        self.position = nn.Parameter(torch.randn(6, 8) / 8)
        self.norms = nn.ModuleList(nn.BatchNorm1d(8) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.position
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x.transpose(1, 2)).transpose(1, 2))
        return self.head(x.mean(1))


@pytest.mark.parametrize("scale", [1e-4, 0.02, 1.0, 50.0])
def test_units_of_a_stream_fit_the_finest_step_that_it_reaches(scale: float) -> None:
    torch.manual_seed(0)
    network, x = PreNormalised(), torch.randn(64, 6, 8)
    with torch.no_grad():
        for one in (network.stem.weight, network.position, *(layer.weight for layer in network.layers)):
            one.mul_(scale)
    for norm in network.norms:
        norm.momentum = 1.0
    network.train()(x)
    config = VerticalConfig(first_last=8)
    model = qcompile.prepare(network.eval(), x, bits=(2, 4), config=config)
    qcompile.calibrate(model, [x])
    graph = qcompile.convert(model.eval(), 2).graph
    nodes = {node.name: node for node in graph.nodes}
    step = nodes["head_input_quantizer"].meta["unit"]
    sums = [node for name, node in nodes.items() if "_output_" in name and "unit" in node.meta]
    report = verify(model, x, bits=2)
    assert report.exact, report.failures
    assert len(sums) >= 3
    assert max(node.meta["unit"] for node in sums) < 2.0**-11 * step


@pytest.mark.parametrize(("seed", "bits"), [(1, 2), (3, 4)])
def test_float_sums_over_large_areas_round_no_more_than_others(seed: int, bits: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(4, 3, 56, 56) + 0.3
    model = qcompile.prepare(PooledHead(gated=True), x, scheme="n2uq", bits=(2, 4))
    qcompile.calibrate(model, [x])
    for target in ("onnx-qdq", "onnx-packed"):
        report = qcompile.verify(model.eval(), x, bits=bits, target=target)
        assert report.exact, report.failures
