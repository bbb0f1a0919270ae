"""`verify` on graphs with nonuniform quantisers: exactness, one changed number, flips near thresholds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pretend_runtime import PretendRuntime, pretend_request, register
from threshold_graphs import Integers, NonuniformFormulas, nonuniform, scattered
from verify_networks import Residual, copied, find, images, trained

from qcompile.model import QuantModel
from qcompile.passes.integer_model import IntegerModel
from qcompile.passes.threshold_op import NEVER
from qcompile.verify import formulas, verify
from qcompile.verify.chain import ReferenceGraph

#: The quantisers that read one accumulator.
LAYERS = ("block1.conv2.input_quantizer", "block2.conv2.input_quantizer", "head.input_quantizer")
LAYER = LAYERS[0]


@pytest.fixture(scope="module")
def prepared() -> QuantModel:
    return trained(Residual, images())


@pytest.fixture(autouse=True)
def _formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(formulas._FORMULAS, "vertical", NonuniformFormulas())


@pytest.fixture(scope="module")
def model(prepared: QuantModel) -> QuantModel:
    return nonuniform(prepared, scattered())


@pytest.mark.parametrize("bits", [2, 4])
def test_integer_graphs_with_thresholds_are_exact(model: QuantModel, bits: int) -> None:
    report = verify(model, images(), bits=bits)
    assert report.failures == ()
    found = [one.layer for one in report.layers if one.operator == "threshold"]
    assert set(found) >= {LAYER}
    assert all(one.codes_compared for one in report.layers if one.operator == "threshold")


def test_thresholds_of_a_uniform_quantiser_are_the_trained_chain(
    prepared: QuantModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    report = verify(nonuniform(prepared), images(), bits=3)
    assert report.failures == ()
    errors = [one.fold_error for one in report.layers if one.operator == "threshold"]
    assert errors
    assert all(error is not None for error in errors)


def constant(which: int, change: Callable[[torch.Tensor], Any]) -> Callable[[IntegerModel], None]:
    def mutate(graph: IntegerModel) -> None:
        change(graph.constant(find(graph, "threshold", LAYER).args[which]))

    return mutate


def lower_low(graph: IntegerModel) -> None:
    node = find(graph, "threshold", LAYER)
    node.update_arg(3, node.args[3] + 1)
    graph.recompile()


def drop_level(graph: IntegerModel) -> None:
    node = find(graph, "threshold", LAYER)
    name = str(node.args[2].target)
    owner, _, last = name.rpartition(".")
    setattr(graph.get_submodule(owner), last, graph.constant(node.args[2])[:-1])


MUTATIONS = {
    "threshold": constant(2, lambda one: one[0, 2].add_(3)),
    "all thresholds of a channel": constant(2, lambda one: one[:, 1].add_(5)),
    "sign": constant(1, lambda one: one[3].neg_()),
    "low": lower_low,
    "a threshold less": drop_level,
    "threshold that nothing reaches": constant(2, lambda one: one[-1].fill_(NEVER - 1)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_changed_number_names_the_layer(model: QuantModel, name: str) -> None:
    graph = copied(model, 2)
    MUTATIONS[name](graph)
    report = verify(model, images(), target=graph)
    assert not report.exact
    assert f"layer {LAYER!r}" in report.failures[0]


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_changed_number_of_an_artefact_names_the_layer(
    model: QuantModel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch)
    graph = copied(model, 2)
    MUTATIONS[name](graph)
    report = verify(model, images(), target=PretendRuntime(pretend_request(model, graph, images())))
    assert not report.exact
    assert any(f"layer {LAYER!r}: constant" in one for one in report.failures)


def run(model: QuantModel, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    register(monkeypatch)
    request = pretend_request(model, copied(model, 4), images())
    return verify(model, images(), target=PretendRuntime(request, exact=False, **options))


def test_a_float_runtime_may_flip_within_its_error_of_a_threshold(
    model: QuantModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run(model, monkeypatch, noise=1.2, stated=1.2)
    flips = [one for one in report.flips if one.layer == LAYER]
    assert flips
    assert all(0.5 <= one.distance <= one.bound for one in flips)
    assert [one for one in report.failures if LAYER in one] == []
    report = run(model, monkeypatch, noise=3.0, stated=0.6)
    assert any(f"layer {LAYER!r}" in one for one in report.failures)


def test_an_exact_runtime_may_not_flip(model: QuantModel, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run(model, monkeypatch, noise=1.2)
    assert not report.exact
    assert report.flips == ()


def test_a_flip_skips_codes_that_no_value_takes(
    prepared: QuantModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def paired(sign: Integers, levels: Integers) -> tuple[Integers, Integers]:
        """Every second code is never taken."""
        levels[1::2] = levels[: len(levels) - len(levels) % 2 : 2]
        return sign, levels

    report = run(nonuniform(prepared, paired), monkeypatch, noise=1.2, stated=1.2)
    flips = [one for one in report.flips if one.layer == LAYER]
    assert {abs(one.expected - one.actual) for one in flips} == {2}


def test_float_inputs_stand_for_the_nearest_integer(model: QuantModel) -> None:
    graph = ReferenceGraph(copied(model, 4))
    node = next(one for one in graph.nodes if graph.model.operator_name(one) == "threshold")
    sign, thresholds = (graph.constants[one.name].numpy() for one in node.args[1:3])
    whole = np.clip((thresholds[3] * sign)[None] + np.arange(-3, 4), -(2**20), 2**20)
    source, rng = node.args[0].name, np.random.default_rng(0)
    exact = graph.evaluate(node, {source: whole})
    near = graph.evaluate(node, {source: whole + rng.uniform(-0.49, 0.49, whole.shape)})
    np.testing.assert_array_equal(exact, near)
    assert graph.code_range(node) == (0, 15)
    assert graph.holds_codes(node)
