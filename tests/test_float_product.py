"""Products of float matrices in machine code, over random shapes, against float64."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from amx import FLAGS
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm")
pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")

from qcompile.backends.tvm.artefact import kernel_artefact  # noqa: E402
from qcompile.backends.tvm.kernels.products import float_product_kernel  # noqa: E402
from qcompile.backends.tvm.library import Library  # noqa: E402
from qcompile.backends.tvm.processors import X86, Processor  # noqa: E402


@pytest.mark.skipif("avx2" not in FLAGS, reason="this processor has no AVX2")
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    leading=st.sampled_from([(), (2,), (1, 3)]),
    rows=st.integers(1, 9),
    inner=st.integers(1, 40),
    columns=st.integers(1, 100),
    is_transposed=st.booleans(),
    threads=st.integers(1, 2),
)
def test_products(
    tmp_path_factory: Any,
    leading: tuple[int, ...],
    rows: int,
    inner: int,
    columns: int,
    is_transposed: bool,
    threads: int,
) -> None:
    rng = np.random.default_rng(rows * inner)
    first = rng.standard_normal((*leading, rows, inner), np.float32)
    second = rng.standard_normal(
        (*leading, *((columns, inner) if is_transposed else (inner, columns))), np.float32
    )
    expected = first.astype(np.float64) @ (np.swapaxes(second, -1, -2) if is_transposed else second)
    kernel = float_product_kernel("kernel", first.shape, second.shape, is_transposed)
    given_ = [(one.shape, "float32") for one in (first, second)]
    folder: Path = tmp_path_factory.mktemp("product")
    processor = Processor("here", {"mcpu": "haswell"}, frozenset(("avx2",)), "1")
    artefact = kernel_artefact(kernel, given_, [(expected.shape, "float32")], X86, processor, folder)
    (found,) = Library(artefact, threads).run([torch.from_numpy(one).clone() for one in (first, second)])
    largest = (np.abs(first).max() * np.abs(second).max()) * inner
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6 * largest)
