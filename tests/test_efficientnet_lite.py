"""A pretrained network with depthwise convolutions on real images, calibrated without training."""

from __future__ import annotations

import efficientnet_lite
import pytest
import torch

import qcompile
from qcompile.passes.schemes.vertical import VerticalConfig

pytestmark = pytest.mark.slow

CALIBRATED = 64


@pytest.fixture(scope="module")
def scored(data):
    """The float network, the model at 8 bits, images and labels that calibration has not seen."""
    network, (images, labels) = efficientnet_lite.pretrained(data), efficientnet_lite.images(data)
    config = VerticalConfig(weight_step="channel", first_last=8)
    model = qcompile.prepare(network, images[:2], bits=(4, 8), config=config).eval()
    qcompile.calibrate(model, images[:CALIBRATED].split(16))
    return network, model, images[CALIBRATED:], labels[CALIBRATED:]


def _accuracy(network, images, labels) -> float:
    with torch.no_grad():
        found = torch.cat([network(part).argmax(1) for part in images.split(17)])
    return 100.0 * float((found == labels).float().mean())


def test_8_bits_keep_the_accuracy(scored):
    network, model, images, labels = scored
    before = _accuracy(network, images, labels)
    assert before == pytest.approx(88.97, abs=0.01)  # 121 of the 136 images
    after = _accuracy(qcompile.at(model, 8), images, labels)
    assert after >= before - 1.5


@pytest.mark.parametrize(
    ("target", "count"), [(None, 16), ("onnx-qdq", 8), ("onnx-packed", 8), ("x86", 4), ("arm", 1)]
)
def test_every_target_is_exact(scored, target, count):
    _, model, images, _ = scored
    report = qcompile.verify(model, images[:count], bits=8, target=target)
    assert report.exact, report
