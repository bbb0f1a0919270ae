"""One changed number in the converted graph makes `verify` fail and name the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pretend_runtime import PretendRuntime, pretend_request, register
from verify_networks import Residual, copied, find, images, trained

from qcompile.model import QuantModel
from qcompile.passes.integer_model import IntegerModel
from qcompile.verify import verify

Mutation = Callable[[IntegerModel], None]


@pytest.fixture(scope="module")
def model() -> QuantModel:
    return trained(Residual, images())


def change_constant(name: str, by: int, index: int = 0) -> Mutation:
    """Add `by` to one entry of a constant."""

    def mutate(graph: IntegerModel) -> None:
        flat = graph.constants()[name].view(-1)
        flat[index] += by

    return mutate


def change_argument(operator: str, layer: str, position: int, change: Callable[[Any], Any]) -> Mutation:
    """Replace one argument of a node."""

    def mutate(graph: IntegerModel) -> None:
        node = find(graph, operator, layer)
        node.update_arg(position, change(node.args[position]))
        graph.recompile()

    return mutate


def flip_code(name: str, index: int = 0) -> Mutation:
    """Flip the lowest bit of one weight code."""

    def mutate(graph: IntegerModel) -> None:
        graph.constants()[name].view(-1)[index] ^= 1

    return mutate


QUANTIZER = "block2.conv1.input_quantizer"

#: An input feature of the linear layer that is not zero for every image.
LIVE_FEATURE = 3

#: Mutations of the 2-bit graph, each with the layer at fault.
MUTATIONS: dict[str, tuple[Mutation, str]] = {
    "weight code of a convolution": (flip_code("block1.conv2.weight_codes"), "block1.conv2"),
    "weight code of a 1x1 convolution": (flip_code("block2.down.0.weight_codes"), "block2.down.0"),
    "weight code of a linear layer": (flip_code("middle.weight_codes", LIVE_FEATURE), "middle"),
    "multiplier": (change_constant(f"{QUANTIZER}.multiplier_0", 1, 3), QUANTIZER),
    "multiplier of the residual": (change_constant(f"{QUANTIZER}.multiplier_1", -1), QUANTIZER),
    "constant": (change_constant(f"{QUANTIZER}.constant", 1, 2), QUANTIZER),
    "shift": (change_argument("requantize", QUANTIZER, 3, lambda shift: shift + 1), QUANTIZER),
    "low clip": (change_argument("requantize", QUANTIZER, 4, lambda low: low + 1), QUANTIZER),
    "high clip": (change_argument("requantize", QUANTIZER, 5, lambda high: high - 1), QUANTIZER),
    "padding": (
        change_argument("accumulate_conv", "block1.conv1", 5, lambda pads: [2, 0, *pads[2:]]),
        "block1.conv1",
    ),
    "padding that changes the shape": (
        change_argument("accumulate_conv", "block2.conv1", 5, lambda pads: [*pads[:3], pads[3] + 2]),
        "block2.conv1",
    ),
    "stride": (change_argument("accumulate_conv", "block2.down.0", 4, lambda _: [1, 2]), "block2.down.0"),
    "offset numerator": (
        change_argument("accumulate_conv", "block1.conv1", 2, lambda numerator: numerator + 1),
        "block1.conv1",
    ),
    "offset shift": (
        change_argument("accumulate_linear", "middle", 3, lambda shift: shift - 1),
        "middle",
    ),
    "step of a quantize": (
        change_argument("quantize", "block1.conv1", 1, lambda step: step * 1.01),
        "block1.conv1.input_quantizer",
    ),
    "window of a pool": (
        change_argument("sum_pool", "adaptive_avg_pool2d", 1, lambda kernel: [kernel[0] - 1, kernel[1]]),
        "adaptive_avg_pool2d",
    ),
    "float weight of the stem": (change_constant("stem.weight", 1, 5), "stem"),
    "float bias of the head": (change_constant("head.bias", 1), "head"),
}

#: Changes too small to show in any code of a few images; comparing constants finds them.
BELOW_A_CODE = ("multiplier", "multiplier of the residual", "constant")


#: Float values are not in the pretended trace: what follows them is at fault.
SEEN_AT = {"float weight of the stem": "block1.conv1.input_quantizer", "float bias of the head": "outputs"}


def mutant(model: QuantModel, mutate: Mutation) -> IntegerModel:
    graph = copied(model, 2)
    mutate(graph)
    return graph


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_graph_is_not_exact(model: QuantModel, name: str) -> None:
    mutate, layer = MUTATIONS[name]
    report = verify(model, images(), target=mutant(model, mutate))
    assert not report.exact
    assert f"layer {layer!r}" in report.failures[0]


@pytest.mark.parametrize("name", [name for name in MUTATIONS if name not in BELOW_A_CODE])
def test_an_artefact_that_hides_its_constants_is_caught_by_what_it_computes(
    model: QuantModel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch)
    mutate, layer = MUTATIONS[name]
    executable = PretendRuntime(pretend_request(model, mutant(model, mutate), images()))
    executable.claimed = PretendRuntime(pretend_request(model, copied(model, 2), images())).constants()
    # some loud enough that every code occurs
    report = verify(model, torch.cat([images(), 4 * images(), -images()]), target=executable)
    assert not report.exact
    witness = SEEN_AT.get(name, f"layer {layer!r}")
    assert any(witness in failure or "does not run" in failure for failure in report.failures)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_artefact_is_not_exact(
    model: QuantModel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch)
    mutate, layer = MUTATIONS[name]
    executable = PretendRuntime(pretend_request(model, mutant(model, mutate), images()))
    report = verify(model, images(), target=executable)
    assert not report.exact
    named = any(layer in failure for failure in report.failures)
    assert named or "does not run" in report.failures[0]


def test_the_unmutated_graph_and_artefact_are_exact(
    model: QuantModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch)
    graph = copied(model, 2)
    assert verify(model, images(), target=graph).exact
    assert verify(model, images(), target=PretendRuntime(pretend_request(model, graph, images()))).exact


def test_the_graph_that_eval_mode_runs_is_checked_against_a_fresh_one() -> None:
    model = trained(Residual, images(), steps=1)
    flip_code("block1.conv2.weight_codes")(model.integer_model(model.active, [(2, 3, 12, 12)]))
    report = verify(model, images())
    assert not report.exact
    assert "layer 'block1.conv2': constant 'block1.conv2.weight_codes'" in report.failures[0]


def test_a_graph_of_another_mode_is_not_exact(model: QuantModel) -> None:
    graph = copied(model, 2)
    graph.mode = model.prepared_modes[2]
    report = verify(model, images(), target=graph)
    assert not report.exact
    assert any("weight_codes" in failure for failure in report.failures)


def test_a_changed_weight_after_conversion_is_noticed(model: QuantModel) -> None:
    graph = copied(model, 4)
    later = trained(Residual, images(), steps=4)
    assert not verify(later, images(), target=graph).exact


def test_a_missing_node_is_named(model: QuantModel) -> None:
    graph = copied(model, 4)
    relu = next(node for node in graph.graph.nodes if graph.operator_name(node) == "aten.relu")
    relu.replace_all_uses_with(relu.args[0])
    graph.graph.erase_node(relu)
    graph.recompile()
    report = verify(model, images(), target=graph)
    assert f"layer {relu.name!r}: node {relu.name!r} is missing" in report.failures


def test_a_wrong_formula_is_noticed(model: QuantModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of weight codes does not lean on the conversion."""
    from qcompile.passes import vertical_weights

    ceil = torch.ceil
    monkeypatch.setattr(
        vertical_weights, "lower_code", lambda highest, dropped: ceil(highest * 2.0**-dropped)
    )
    report = verify(model, images(), bits=2)
    assert not report.exact
    assert any("by the scheme's formula" in failure for failure in report.failures)


@pytest.mark.parametrize("broken", ["scale_and_shift", "forgotten bias"])
def test_a_wrong_fold_is_noticed(model: QuantModel, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of epilogues does not lean on the fold."""
    from qcompile.passes.batchnorm import ModeBatchNorm

    original = ModeBatchNorm.scale_and_shift

    def wrong(self: ModeBatchNorm, *given: Any) -> Any:
        maps = original(self, *given)
        assert maps is not None
        scale, shift = maps
        return (scale * 1.02, shift) if broken == "scale_and_shift" else (scale, shift * 0.9)

    monkeypatch.setattr(ModeBatchNorm, "scale_and_shift", wrong)
    report = verify(model, images(), bits=4)
    assert not report.exact
    assert any("not the nearest to the trained chain" in failure for failure in report.failures)
    assert any("block1.conv2.input_quantizer" in failure for failure in report.failures)
