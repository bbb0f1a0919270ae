"""Integer graphs as graphs of kernels: every code, accumulator and stream equals the integer graph's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from amx import FLAGS
from verify_networks import LARGE_ONES_SLOW, NETWORKS, trained

tvm = pytest.importorskip("tvm")

from qcompile.backends.tvm import api  # noqa: E402
from qcompile.backends.tvm.costs import Costs  # noqa: E402
from qcompile.backends.tvm.kernel_graph import Builder  # noqa: E402
from qcompile.backends.tvm.lowering import import_graph, optimise  # noqa: E402
from qcompile.backends.tvm.maps import from_memory  # noqa: E402
from qcompile.backends.tvm.processors import X86, select  # noqa: E402
from qcompile.backends.tvm.rules import RULES  # noqa: E402

pytestmark = pytest.mark.skipif("avx2" not in FLAGS, reason="this processor has no AVX2")


@pytest.mark.parametrize("name", LARGE_ONES_SLOW)
def test_kernels_compute_the_integer_graph(name: str) -> None:
    kind, x = NETWORKS[name]
    model = trained(kind, x)
    use_vnni = "avx512_vnni" in FLAGS and name != "residual"
    (processor,) = select(X86, None, ("vnni" if use_vnni else "avx2",))
    target = api.llvm(X86.triple, processor.target)
    mode = model.prepared_modes[len(name) % 3]
    shapes = (tuple(x.shape),)
    integer = model.integer_model(mode, shapes)
    builder = Builder(integer, shapes, Costs(X86, processor, False).choose, RULES, tapped=True)
    module = optimise(import_graph(builder.run(), shapes), target)
    machine = tvm.relax.VirtualMachine(tvm.compile(module, target=target), tvm.cpu())
    found = [one.numpy() for one in machine["main"](tvm.runtime.tensor(x.numpy()))]
    expected, values = integer.run_with_values((x,))
    logits = found[0]
    reference = expected[0].numpy()
    assert np.abs(logits - reference).max() <= 1e-5 * np.abs(reference).max()
    assert len(builder.taps) >= 4
    behind_islands: set[str] = set()
    for (node, tap), array in zip(builder.taps.items(), found[1:], strict=True):
        mapped = tap.mapped
        want = values[node].numpy()
        got = from_memory(array, mapped.map)
        got = np.moveaxis(got, 1, -1) if mapped.rows or want.ndim == 2 else got
        different = got.reshape(want.shape) != want
        if different.any():
            # the last bits of a fixed-point stream follow the float operators that feed it
            behind_islands.add(node)
            assert want.dtype == np.int32
            assert np.abs(got.reshape(want.shape) - want).max() <= 2**12
            assert different.mean() < 0.2
    codes = [node for node in builder.taps if values[node].dtype in (torch.uint8, torch.int8)]
    assert codes
    assert not behind_islands & set(codes)
