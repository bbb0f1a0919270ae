"""`threshold` against the independent reference, and what it refuses, run or read from a file."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import trained
from threshold_graphs import scattered, stairs, with_thresholds
from torch._subclasses.fake_tensor import FakeTensorMode

import qcompile
from qcompile.errors import FileFormatError, InvalidArgument
from qcompile.file.graph_json import decode_graph, encode_graph
from qcompile.modes import Mode
from qcompile.passes import code_types, integer_ops
from qcompile.passes.static_values import static_values
from qcompile.passes.threshold_op import ALWAYS, NEVER
from qcompile.verify import reference

threshold = torch.ops.qcompile.threshold


@st.composite
def quantisers(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([torch.uint8, torch.int8, torch.int32, torch.int64]))
    info = torch.iinfo(dtype)
    reach = draw(st.sampled_from([50, 2**20, 2**31 - 2]))
    low, high = max(info.min, -reach), min(info.max, reach)
    spatial = draw(st.sampled_from([(), (3,), (4, 5)]))
    x = rng.integers(low, high + 1, (2, 6, *spatial))
    per_channel = [(), (6, *(1 for _ in spatial))]
    levels = draw(st.sampled_from([1, 2, 3, 15, 255]))
    shape = draw(st.sampled_from(per_channel))
    thresholds = np.sort(rng.integers(low - 3, high + 4, (levels, *shape)), 0)
    thresholds[:1], thresholds[-1:] = draw(st.sampled_from([(ALWAYS, NEVER), (low, high), (0, high)]))
    sign = rng.choice([-1, 1], draw(st.sampled_from(per_channel)))
    smallest = draw(st.integers(0, 255 - levels) if levels > 127 else st.integers(-128, 127 - levels))
    tensors = (torch.tensor(x, dtype=dtype), torch.tensor(sign, dtype=torch.int8))
    return (*tensors, torch.tensor(np.sort(thresholds, 0), dtype=torch.int32), smallest)


@given(quantisers())
@settings(max_examples=120, deadline=None)
def test_codes_equal_the_reference(case: Any) -> None:
    x, sign, thresholds, low = case
    found = threshold(x, sign, thresholds, low)
    expected = reference.threshold(x.numpy(), sign.numpy(), thresholds.numpy(), low)
    np.testing.assert_array_equal(found.numpy(), expected)
    # the same from the definition, one element at a time
    signs = sign.expand(x.shape).reshape(-1).tolist()
    columns = thresholds.reshape(
        len(thresholds), *(1,) * (x.dim() + 1 - thresholds.dim()), *thresholds.shape[1:]
    )
    columns = columns.expand(-1, *x.shape).flatten(1).T.tolist()
    counted = [
        low + sum(s * v >= t for t in column)
        for s, v, column in zip(signs, x.reshape(-1).tolist(), columns, strict=True)
    ]
    assert found.reshape(-1).tolist() == counted
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = threshold(x, sign, thresholds, low)
    assert (fake.dtype, fake.shape) == (found.dtype, found.shape)
    assert found.dtype == code_types.code_dtype(low, low + len(thresholds))


def test_pieces_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randint(-1000, 1000, (7, 5, 3, 2), dtype=torch.int32)
    arguments = (torch.ones((), dtype=torch.int8), torch.tensor([-500, 0, 3, 800], dtype=torch.int32), -2)
    whole = threshold(x, *arguments)
    monkeypatch.setattr("qcompile.passes.threshold_op.PIECE", 60)
    assert torch.equal(threshold(x, *arguments), whole)
    assert threshold(x[:0], *arguments).shape == (0, 5, 3, 2)


@given(st.integers(0, 2**32 - 1), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_a_requantisation_is_thresholds(seed: int, shift: int) -> None:
    rng = np.random.default_rng(seed)
    low = int(rng.integers(-8, 8))
    high = low + int(rng.integers(1, 16))
    multiplier = rng.integers(-(2**30), 2**30, (6, 1, 1)) >> rng.integers(0, 31)
    constant = rng.integers(-(2**40), 2**40, (6, 1, 1))
    sign, thresholds = (torch.from_numpy(one) for one in stairs(multiplier, constant, shift, low, high))
    edges = thresholds[rng.integers(len(thresholds))].clamp(-(2**20), 2**20) * sign
    near = edges + torch.from_numpy(rng.integers(-2, 3, (2, 6, 3, 3)))
    x = torch.cat([near, torch.from_numpy(rng.integers(-(2**20), 2**20, (2, 6, 3, 3)))]).int()
    found = threshold(x, sign.to(torch.int8), thresholds.int(), low)
    expected = integer_ops.requantize(
        [x], [torch.from_numpy(multiplier)], torch.from_numpy(constant), shift, low, high
    )
    assert torch.equal(found.int(), expected.int())


CODES = torch.zeros((2, 3, 4, 4), dtype=torch.int32)
PLUS = torch.ones((3, 1, 1), dtype=torch.int8)
LEVELS = torch.zeros((4, 3, 1, 1), dtype=torch.int32)

#: Arguments that the operator refuses.
REFUSED: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]] = {
    "float input": (CODES.float(), PLUS, LEVELS, 0),
    "int16 input": (CODES.short(), PLUS, LEVELS, 0),
    "wide sign": (CODES, PLUS.int(), LEVELS, 0),
    "float thresholds": (CODES, PLUS, LEVELS.float(), 0),
    "wide thresholds": (CODES, PLUS, LEVELS.long(), 0),
    "no dimension of levels": (CODES, PLUS, LEVELS[0, 0, 0, 0], 0),
    "no level": (CODES, PLUS, LEVELS[:0], 0),
    "256 levels": (CODES, PLUS, LEVELS[:1].expand(256, 3, 1, 1), 0),
    "other channels": (CODES, PLUS[:2], LEVELS, 0),
    "too many dimensions": (CODES, PLUS, LEVELS[:, None, None], 0),
    "constants that enlarge": (CODES[:, :1], PLUS, LEVELS, 0),
    "codes above 255": (CODES, PLUS, LEVELS, 252),
    "codes below -128": (CODES, PLUS, LEVELS, -129),
    "signed codes above 127": (CODES, PLUS, LEVELS[:1].expand(200, 3, 1, 1), -1),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_arguments_are_refused_with_and_without_data(case: str) -> None:
    with pytest.raises(ValueError):
        threshold(*REFUSED[case])
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError):
        threshold(*REFUSED[case])


# ---- files ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored() -> tuple[list[Any], dict[str, torch.Tensor]]:
    """A graph with thresholds as a file holds it."""
    model, _ = trained("plain")
    graph = model.integer_model(Mode(2, 2))
    assert with_thresholds(graph, scattered())
    return json.loads(json.dumps(encode_graph(graph))), graph.constants()


def _thresholds(nodes: list[Any]) -> list[Any]:
    return next(node for node in nodes if node[2].startswith("qcompile::threshold"))


def test_graphs_with_thresholds_survive_json(stored: Any) -> None:
    nodes, constants = stored
    rebuilt = decode_graph(nodes, constants, Mode(2, 2))
    assert encode_graph(rebuilt) == nodes
    x = torch.randn(4, 1, 14, 14)
    assert rebuilt(x)[0].shape == (4, 4)


def _constant(nodes: list[Any], argument: int) -> str:
    """Name of the constant that is an argument of the first threshold."""
    name = _thresholds(nodes)[3][argument]["node"]
    return str(next(node[2] for node in nodes if node[0] == name))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda n, c: c[_constant(n, 1)].zero_(), "neither 1 nor -1"),
        (lambda n, c: c[_constant(n, 1)].fill_(-128), "neither 1 nor -1"),
        (lambda n, c: c[_constant(n, 2)][0].fill_(NEVER), "do not ascend"),
        (lambda n, c: c.update({_constant(n, 2): c[_constant(n, 2)].long()}), "int32"),
        (lambda n, c: c.update({_constant(n, 2): c[_constant(n, 2)].float()}), "int32"),
        (lambda n, c: c.update({_constant(n, 1): c[_constant(n, 1)].bool()}), "int8"),
        (lambda n, c: c.update({_constant(n, 2): torch.tensor(3, dtype=torch.int32)}), "int32"),
        (lambda n, c: c.update({_constant(n, 2): c[_constant(n, 2)][:0]}), "not 0"),
        (lambda n, c: c.update({_constant(n, 2): torch.zeros(256, dtype=torch.int32)}), "not 256"),
        (lambda n, c: _thresholds(n)[3].pop(), "four arguments"),
        (lambda n, c: _thresholds(n)[3].__setitem__(1, 1), "constants only"),
        (lambda n, c: _thresholds(n)[3].__setitem__(2, _thresholds(n)[3][0]), "constants only"),
        (lambda n, c: _thresholds(n)[3].__setitem__(2, [_thresholds(n)[3][2]]), "constants only"),
        (lambda n, c: _thresholds(n).__setitem__(4, {"dict": [["low", 0]]}), "four arguments"),
    ],
)
def test_hostile_thresholds_are_refused(stored: Any, spoil: Any, message: str) -> None:
    nodes, constants = json.loads(json.dumps(stored[0])), {key: one.clone() for key, one in stored[1].items()}
    spoil(nodes, constants)
    with pytest.raises(FileFormatError, match=message):
        decode_graph(nodes, constants, Mode(2, 2))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda n, c: _thresholds(n)[3].__setitem__(3, 1.5),
        lambda n, c: _thresholds(n)[3].__setitem__(3, "0"),
        lambda n, c: _thresholds(n)[3].__setitem__(3, 2**70),
        lambda n, c: _thresholds(n)[3].__setitem__(3, -200),
        lambda n, c: _thresholds(n)[3].__setitem__(0, 1),
        lambda n, c: c.update({_constant(n, 2): torch.zeros((3, 5, 1, 1), dtype=torch.int32)}),
        lambda n, c: c.update({_constant(n, 1): torch.ones((1, 1, 1, 1, 1), dtype=torch.int8)}),
    ],
)
def test_thresholds_that_do_not_run_are_refused_without_data(stored: Any, spoil: Any) -> None:
    nodes, constants = json.loads(json.dumps(stored[0])), dict(stored[1])
    spoil(nodes, constants)
    with pytest.raises(InvalidArgument):
        static_values(decode_graph(nodes, constants, Mode(2, 2)), ((2, 1, 14, 14),))


def test_a_file_with_thresholds_comes_back(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = trained("plain")
    for mode in model.prepared_modes:  # kept until the model trains
        with_thresholds(model.integer_model(mode), scattered(mode.weight_bits))
    converted = type(model).integer_model
    graphs = {mode: converted(model, mode) for mode in model.prepared_modes}
    monkeypatch.setattr(type(model), "integer_model", lambda self, mode, shapes=None: graphs[mode])
    qcompile.save(model, tmp_path / "m.qcm")
    loaded = qcompile.load(tmp_path / "m.qcm")
    for mode in model.prepared_modes:
        assert torch.equal(qcompile.at(loaded, mode)(x), graphs[mode](x)[0])
