"""Groups of inputs with multipliers: steps of groups in modes that multiply codes with codes."""

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
from torch import Tensor, nn

import qcompile
from qcompile.errors import InvalidArgument
from qcompile.model import QuantModel
from qcompile.passes.integer_model import IntegerModel
from qcompile.passes.integer_ops import accumulate_groups
from qcompile.passes.schemes.vertical import VerticalConfig
from qcompile.passes.static_values import static_values
from qcompile.passes.vertical_weights import MOST_MULTIPLES, VerticalWeightQuantizer
from qcompile.verify import reference

MODES = ("w2a8", "w4a8", "w8a8")


class Net(nn.Module):
    """Linear layers with 4 groups, 3 groups, one group, and a number of inputs that groups do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(20, 128), nn.Linear(128, 96), nn.Linear(96, 32)
        self.c, self.head = nn.Linear(32, 40), nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(self.stem(x).relu()).relu()) + 0.3).relu())


@pytest.fixture(scope="module")
def prepared() -> tuple[QuantModel, Tensor]:
    torch.manual_seed(0)
    network, x = Net().eval(), torch.randn(3, 20)
    with torch.no_grad():  # groups of different ranges
        network.a.weight.mul_(torch.tensor([1.0, 0.3, 2.0, 0.05]).repeat_interleave(32))
    model = qcompile.prepare(network, x, modes=MODES, config=VerticalConfig(weight_step=32))
    qcompile.calibrate(model, [x])
    return model.eval(), x


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(0, 3), st.integers(0, 2**31))
def test_the_operator_is_the_sum_over_groups(
    outputs: int, groups: int, size: int, shift: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    codes, weight = (
        rng.integers(-128, 128, (2, 3, groups * size)),
        rng.integers(-8, 8, (outputs, groups * size)),
    )
    times, numerator = rng.integers(1, 16, (outputs, groups)), int(rng.integers(-3, 4))
    expected = np.zeros((2, 3, outputs), np.int64)
    for o in range(outputs):
        for k in range(groups * size):
            expected[..., o] += times[o, k // size] * codes[..., k] * (2**shift * weight[o, k] + numerator)
    given_ = [torch.from_numpy(one) for one in (codes.astype(np.int8), weight.astype(np.int8))]
    found = accumulate_groups(*given_, numerator, shift, torch.from_numpy(times.astype(np.uint8)), 2**30)
    np.testing.assert_array_equal(found.numpy(), expected)
    mine = reference.accumulate_groups(codes, weight, numerator, shift, times)
    np.testing.assert_array_equal(mine, expected)


def test_steps_are_multiples_of_a_unit_and_learn() -> None:
    weight = torch.randn(6, 64) * torch.tensor([1.0, 0.5, 0.01, 2.0]).repeat_interleave(16)
    quantizer = VerticalWeightQuantizer((2, 4), VerticalConfig(weight_step=16), weight.shape, False, True)
    quantizer.initialise(weight)
    for row in range(2):
        codes = quantizer.codes(weight, row)
        assert codes.multipliers is not None
        assert codes.multipliers.shape == (6, 4)
        assert codes.scale.shape == (6,)
        assert torch.equal(codes.multipliers.amax(1), torch.full((6,), MOST_MULTIPLES, dtype=torch.int16))
        assert int(codes.multipliers.min()) == 1
        offset = codes.offset_numerator / 2**codes.offset_shift
        step = (codes.scale.unsqueeze(1) * codes.multipliers).repeat_interleave(16, 1)
        value = quantizer(weight, row)
        torch.testing.assert_close(value.double(), step * (codes.codes + offset), rtol=1e-6, atol=0)
        value.sum().backward()
    assert quantizer.step.grad is not None
    assert (quantizer.step.grad != 0).all()


def test_groups_fit_better_than_channels() -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(2))
    weight *= torch.rand(32, 8, generator=torch.Generator().manual_seed(3)).repeat_interleave(32, 1) + 0.1
    errors = {}
    for kind in ("channel", 32):
        config = VerticalConfig(weight_step=kind)
        quantizer = VerticalWeightQuantizer((2, 4), config, weight.shape, False, True)
        quantizer.initialise(weight)
        quantizer.search(weight, torch.ones(()))
        errors[kind] = float((quantizer(weight, 1).detach() - weight).square().mean())
    assert errors[32] < 0.6 * errors["channel"]


def test_layers_get_the_groups_that_fit(prepared: tuple[QuantModel, Tensor]) -> None:
    graph = prepared[0].integer_model(prepared[0].find("w4a8"), ((3, 20),))
    kinds = {str(node.meta["layer"]): graph.operator_name(node) for node, _ in graph.weights()}
    assert kinds == {"a": "accumulate_groups", "b": "accumulate_groups", "c": "accumulate_linear"}


@pytest.mark.parametrize("target", [None, "onnx-qdq", "onnx-packed"])
@pytest.mark.parametrize("mode", MODES)
def test_modes_are_exact(prepared: tuple[QuantModel, Tensor], mode: str, target: str | None) -> None:
    model, x = prepared
    report = qcompile.verify(model, x, bits=mode, target=target)
    assert report.exact, report


def test_a_file_keeps_multipliers_once_and_is_a_prefix(
    prepared: tuple[QuantModel, Tensor], tmp_path: Path
) -> None:
    model, x = prepared
    qcompile.save(model, tmp_path / "model.qcm")
    for mode in MODES:
        loaded = qcompile.load(tmp_path / "model.qcm", bits=mode)
        assert torch.equal(loaded(x), qcompile.at(model, mode)(x))
    graph = model.integer_model(model.find("w2a8"), ((3, 20),))
    (node,) = [one for one in graph.graph.nodes if one.name == "a_accumulate"]
    multipliers = graph.constant(node.args[4]).numpy().tobytes()
    assert (tmp_path / "model.qcm").read_bytes().count(multipliers) == 1


@pytest.mark.parametrize("shape", [(96, 5), (95, 4), (96, 0), (96,)])
def test_multipliers_that_do_not_fit_are_refused(
    prepared: tuple[QuantModel, Tensor], shape: tuple[int, ...]
) -> None:
    graph = prepared[0].integer_model(prepared[0].find("w4a8"), ((3, 20),))
    constants = {**graph.constants(), "a.weight_multipliers": torch.ones(shape, dtype=torch.uint8)}
    spoilt = IntegerModel(constants, graph.graph, graph.mode)
    with pytest.raises(InvalidArgument, match=r"multipliers of shape .* do not fit"):
        static_values(spoilt, ((3, 20),))


def test_modes_for_weights_only_may_share_the_groups() -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 20)
    model = qcompile.prepare(Net().eval(), x, modes=("w4a4", "w4"), config=VerticalConfig(weight_step=32))
    qcompile.calibrate(model, [x])
    model.eval()
    for mode in ("w4a4", "w4"):
        assert qcompile.verify(model, x, bits=mode).exact
    assert torch.equal(
        model.a.weight_quantizer.codes(model.a.weight, 0).codes,
        model.a.weight_quantizer.codes(model.a.weight, 1).codes,
    )


def test_embeddings_and_last_layers_have_groups_too() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.a, self.head = nn.Embedding(9, 64), nn.Linear(64, 64), nn.Linear(64, 9)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.a(self.words(tokens)).relu())

    torch.manual_seed(1)
    tokens = torch.tensor([[3, 4, 5], [1, 8, 0]])
    config = VerticalConfig(weight_step=16, first_last=8)
    model = qcompile.prepare(Words().eval(), tokens, bits=(2, 8), config=config)
    qcompile.calibrate(model, [tokens])
    for bits in (2, 8):
        assert qcompile.verify(model.eval(), tokens, bits=bits).exact
        assert qcompile.verify(model, tokens, bits=bits, target="onnx-qdq").exact


@pytest.mark.skipif("avx2" not in FLAGS or shutil.which("gcc") is None, reason="needs AVX2, and gcc")
@pytest.mark.parametrize(
    ("mode", "kind", "batch"), [("w4a8", "vnni", 1), ("w2a8", "vnni", 3), ("w8a8", "avx2", 3)]
)
def test_machine_code_is_exact(prepared: tuple[QuantModel, Tensor], mode: str, kind: str, batch: int) -> None:
    pytest.importorskip("tvm")
    if kind == "vnni" and "avx512_vnni" not in FLAGS:
        pytest.skip("this processor has no AVX-512 VNNI")
    model, x = prepared
    compiled = qcompile.lower(model, "x86", bits=mode, batch=batch, threads=1, features=(kind,))
    report = qcompile.verify(model, x[:batch], bits=mode, target=compiled)
    assert report.exact, report
    names: list[Any] = [one["kernel"] for one in compiled.kernels() if one["layer"] == "a"]
    assert any("gemv" in one for one in names) == (kind == "vnni")


@pytest.mark.slow
@pytest.mark.skipif("avx2" not in FLAGS or shutil.which("gcc") is None, reason="needs AVX2, and gcc")
@pytest.mark.parametrize("target", ["x86", "arm"])
def test_kinds_of_processors_with_and_without_a_kernel_share_an_object(
    prepared: tuple[QuantModel, Tensor], target: str, tmp_path: Path
) -> None:
    pytest.importorskip("tvm")
    from qcompile.backends.tvm.artefact import make_artefact
    from qcompile.backends.tvm.processors import ARM, X86

    if target == "arm" and shutil.which("qemu-aarch64") is None:
        pytest.skip("needs qemu-aarch64")
    model, x = prepared
    compiled = qcompile.lower(model, target, bits="w8a8", batch=1, threads=1)
    report = qcompile.verify(model, x[:1], bits="w8a8", target=compiled)
    assert report.exact, report
    architecture = {"x86": X86, "arm": ARM}[target]
    every = make_artefact(
        compiled.request, architecture, architecture.processors, None, tmp_path / "every", tapped=True
    )
    assert list(every.variants) == [one.name for one in architecture.processors]
    taps = [list(one.taps) for one in every.variants.values()]
    assert taps[1:] == taps[:-1]
