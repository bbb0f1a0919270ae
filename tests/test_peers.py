"""Peers of `qcompile bench` compute the float network, so that their latencies can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from verify_networks import Residual, images

from qcompile.errors import InvalidArgument
from qcompile.peers import PEERS, open_peer, versions

#: Least cosine with the float network's outputs.
CLOSE = {"int8": 0.98, "bf16": 0.999}


def _array(outputs: Any) -> np.ndarray:
    if isinstance(outputs, torch.Tensor):
        return outputs.float().numpy()
    values = list(outputs.values()) if isinstance(outputs, Mapping) else list(outputs)
    return np.asarray(values[0], np.float32)


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=pytest.mark.slow) if "compile" in one else one for one in PEERS]
)
def test_a_peer_computes_the_network(name):
    for package in PEERS[name][2]:
        pytest.importorskip(package)
    torch.manual_seed(0)
    network, x = Residual().eval(), images()[:4]
    with torch.no_grad():
        expected = network(x).numpy().ravel()
    run = open_peer(name, network, [x], 1)
    for _ in range(2):  # again from the same inputs
        found = _array(run()).ravel()
        cosine = float(found @ expected / np.linalg.norm(found) / np.linalg.norm(expected))
        assert cosine > CLOSE.get(name.partition("-")[2], 1 - 1e-6)
    assert all(version.split()[1][0].isdigit() for version in versions(name).split(", "))


def test_unknown_peers_list_the_known_ones():
    with pytest.raises(InvalidArgument, match="'tflite' is none of the peers torch, "):
        open_peer("tflite", torch.nn.Identity(), [torch.zeros(1)], 1)
