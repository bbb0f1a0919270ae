"""How much first and last layers at 8 bits by calibration change, against rounding in float64."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from nets import example
from torch import Tensor, nn
from torch.nn import functional

import qcompile
from qcompile.model import QuantModel
from qcompile.passes.calibrated_ends import is_calibrated
from qcompile.passes.quantizers import ActivationQuantizer
from qcompile.passes.schemes.vertical import VerticalConfig


def _ends(model: QuantModel) -> list[ActivationQuantizer]:
    """Quantisers of the inputs of the first and of the last layer."""
    found = (one for one in model.modules() if isinstance(one, ActivationQuantizer))
    return [one for one in found if is_calibrated(one)]


def _task(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images of five classes."""
    prototypes = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (count,), generator=generator)
    return prototypes[labels] + torch.randn(count, 3, 12, 12, generator=generator), labels


def test_two_layers_stay_within_the_bound_of_rounding() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 4))
    x = torch.randn(256, 12)
    labels = (x @ torch.randn(12, 4)).argmax(1)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        functional.cross_entropy(network(x), labels).backward()
        optimizer.step()
    network.eval()
    model = qcompile.prepare(network, x, bits=(2, 4), config=VerticalConfig(first_last="int8"))
    qcompile.calibrate(model, [x], method="minmax")
    found = model.eval()(x).double().numpy()
    wide = deepcopy(network).double()
    given, hidden, logits = (part(x.double()).detach().numpy() for part in (nn.Identity(), wide[:2], wide))
    w1, w2 = (wide[index].weight.detach().numpy() for index in (0, 2))
    s1, s2 = (np.abs(one).max(1) / 127 for one in (w1, w2))
    step1, step2 = (float(one.step[0]) for one in _ends(model))
    # |W x - W' x'| <= |W| |x - x'| + |W - W'| |x'|, and ReLU enlarges no difference
    first = (np.abs(w1).sum(1) * step1 + (np.abs(given) + step1 / 2).sum(1, keepdims=True) * s1) / 2
    error = first + step2 / 2
    bound = error @ np.abs(w2).T + (hidden + error).sum(1, keepdims=True) * s2 / 2
    assert (np.abs(found - logits) <= bound * (1 + 1e-6)).all()
    assert bound.max() < 0.1 * np.ptp(logits)  # it says something
    # errors that are as good as random, of variance step^2 / 12, add up to far less; those of weights are the
    # same for all inputs, though
    of_first = (np.square(w1).sum(1) * step1**2 + np.square(given).sum(1, keepdims=True) * s1**2) / 12
    variance = (of_first * (hidden > 0) + step2**2 / 12) @ np.square(w2).T
    variance += np.square(hidden).sum(1, keepdims=True) * s2**2 / 12
    expected = np.sqrt(variance.mean())
    assert np.sqrt(np.square(found - logits).mean()) < 2.0 * expected
    assert expected < 0.02 * logits.std()


@pytest.fixture(scope="module")
def with_float_ends() -> QuantModel:
    network, _ = example("residual")
    x, labels = _task(128, seed=1)
    model = qcompile.prepare(network, x, config=VerticalConfig(first_last="float"), bits=(2, 4)).train()
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    optimizer = torch.optim.Adam(qcompile.param_groups(model, lr=0.01))
    for _ in range(25):
        optimizer.zero_grad()
        joint.backward(x, labels)
        optimizer.step()
    return model.eval()


def test_a_trained_network_changes_by_what_8_bits_round(with_float_ends: QuantModel) -> None:
    x, labels = _task(512, seed=2)
    network, _ = example("residual")
    model = qcompile.prepare(network, x, config=VerticalConfig(first_last="int8"), bits=(2, 4))
    model.load_state_dict(with_float_ends.state_dict())
    qcompile.calibrate(model, [_task(128, seed=1)[0]], weights=False, statistics=False)
    model.eval()
    # the same network, with float ends that read and hold what 8 bits can say
    reference = deepcopy(with_float_ends)
    for name in ("stem", "head"):
        weight = reference.get_parameter(f"{name}.weight")
        exact = weight.detach().double().numpy()
        scale = np.abs(exact.reshape(len(exact), -1)).max(1).reshape(-1, *[1] * (exact.ndim - 1)) / 127
        weight.data = torch.from_numpy(np.rint(exact / scale) * scale).float()
    for row, bits in enumerate(qcompile.modes(model)):
        first, last = (float(one.step[row]) for one in _ends(model))
        codes = np.clip(np.rint(x.double().numpy() / first), -128, 127)
        found = qcompile.at(model, bits)(x)
        wanted = qcompile.at(reference, bits)(torch.from_numpy(codes * first).float())
        # the reference's last layer reads what nobody rounded
        rounding = reference.get_parameter("head.weight").detach().abs().sum(1) * last / 2
        # float32 products of the reference's first layer may tip a code of the second over, rarely
        assert float(((found - wanted).abs() <= rounding).all(1).float().mean()) > 0.99
        floats = qcompile.at(with_float_ends, bits)(x)
        assert float((found - floats).square().mean().sqrt()) < 0.1 * float(floats.std())
        assert float((found.argmax(1) == floats.argmax(1)).float().mean()) > 0.99
        assert float((floats.argmax(1) == labels).float().mean()) > 0.95  # it has learnt something
