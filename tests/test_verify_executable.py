"""`verify` on compiled executables: rounding errors and flips, what a trace leaves out, batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pretend_runtime import PretendRuntime, pretend_request, register
from torch import Tensor, fx, nn
from verify_networks import Gate, Residual, images, trained

import qcompile
from qcompile.errors import InvalidArgument, InvalidInputType
from qcompile.model import QuantModel
from qcompile.verify import VerificationReport, verify

X = torch.cat([images(), -images(), 2 * images()])


@pytest.fixture(scope="module")
def model() -> QuantModel:
    return trained(Residual, images())


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


def runtime(model: QuantModel, x: Tensor = X, **options: Any) -> PretendRuntime:
    request = pretend_request(model, model.integer_model(model.active, [tuple(x.shape)]), x)
    return PretendRuntime(request, **options)


def check(model: QuantModel, x: Tensor = X, **options: Any) -> VerificationReport:
    return verify(model, x, target=runtime(model, x, **options))


def test_a_target_by_name_is_lowered_and_checked(model: QuantModel) -> None:
    report = verify(model, X, bits=3, target="pretend")
    assert report.exact
    assert (report.target, report.mode, report.samples) == ("pretend", 3, 18)


def test_a_runtime_that_executes_the_integers_has_no_flips(model: QuantModel) -> None:
    report = check(model)
    assert report.exact
    assert report.flips == ()
    assert report.logits_error < 1e-5


def test_float_requantisation_within_the_stated_error_is_exact(model: QuantModel) -> None:
    report = check(model, exact=False, stated=1e-4)
    assert report.failures == ()
    assert report.logits_error < 1e-5
    wide = [one for one in report.layers if ".output_" in one.layer]
    assert wide
    assert all(one.largest_deviation <= 1e-4 for one in wide)


def test_noise_within_the_stated_error_gives_listed_flips(model: QuantModel) -> None:
    report = check(model, exact=False, noise=0.02, stated=0.0201)
    assert report.exact
    assert report.flips
    for flip in report.flips:
        assert abs(flip.expected - flip.actual) == 1
        assert flip.distance <= flip.bound == 0.0201
    assert sum(one.flips for one in report.layers) == len(report.flips)
    # behind a flip codes differ and logits move, which is reported and no failure
    assert any(one.behind is not None for one in report.end_to_end.differences)
    assert report.logits_error > 1e-5


def test_flips_are_where_the_runtime_differs(model: QuantModel) -> None:
    """The first epilogue reads accumulators alone, so its flips are all codes that are not the integers."""
    executable = runtime(model, exact=False, noise=0.02, stated=0.0201)
    report = verify(model, X, target=executable)
    node = "block1_conv2_input_quantizer"
    trace = executable.trace([X.numpy()]).values
    graph = executable.request.model
    requantize = next(one for one in graph.graph.nodes if one.name == node)
    sums = trace[requantize.args[0][0].name].astype(np.int64)
    constants = {name: value.numpy() for name, value in graph.constants().items()}
    total = sums * constants[f"{requantize.meta['layer']}.multiplier_0"].astype(np.int64)
    total = total + constants[f"{requantize.meta['layer']}.constant"]
    expected = np.clip(total >> requantize.args[3], 0, 15)
    assert [flip.index for flip in report.flips if flip.node == node] == [
        tuple(int(i) for i in index) for index in np.argwhere(expected != trace[node])
    ]


def test_noise_beyond_the_stated_error_is_a_failure(model: QuantModel) -> None:
    report = check(model, exact=False, noise=0.02, stated=0.001)
    assert not report.exact
    assert any("input_quantizer" in failure for failure in report.failures)


def test_an_exact_target_may_not_flip_even_at_a_tie(model: QuantModel) -> None:
    report = check(model, exact=False, noise=0.02)
    assert not report.exact
    assert report.flips == ()


def test_a_flip_by_two_is_a_failure(model: QuantModel) -> None:
    report = check(model, exact=False, noise=1.5, stated=10.0)
    assert not report.exact
    assert report.flips


def test_a_float_island_of_the_target_may_move_codes_at_ties_only() -> None:
    model = trained(Gate, images(6, 8))
    report = check(model, images(6, 8))
    assert report.exact
    assert not report.end_to_end.required


def test_fused_accumulators_are_recomputed(model: QuantModel) -> None:
    def hidden(node: fx.Node) -> bool:
        return "accumulate" in node.name

    report = check(model, hidden=hidden)
    assert report.exact
    fused = [one for one in report.layers if one.operator.startswith("accumulate")]
    assert not any(one.tapped or one.accumulators_compared for one in fused)


def test_behind_fused_accumulators_wrong_codes_are_still_found(model: QuantModel) -> None:
    executable = runtime(model, exact=False, noise=0.4, stated=0.0, hidden=lambda node: "accum" in node.name)
    assert not verify(model, X, target=executable).exact


def test_a_trace_without_a_layer_is_a_failure(model: QuantModel) -> None:
    report = check(model, hidden=lambda node: node.name.startswith(("block1", "relu", "block2")))
    assert not report.exact
    assert any("layer 'block1.conv1'" in one and "shows nothing" in one for one in report.failures)


def test_the_untapped_run_must_give_the_tapped_outputs(model: QuantModel) -> None:
    executable = runtime(model)
    executable.untapped_offset = 1e-6
    report = verify(model, X, target=executable)
    assert not report.exact
    assert not report.end_to_end.untapped_equal
    assert report.failures == ("outputs: the untapped run differs from the tapped one",)


@pytest.mark.parametrize(("offset", "exact"), [(1e-7, True), (1e-2, False)])
def test_runtimes_that_fuse_float_operators_may_round_differently_without_taps(
    model: QuantModel, offset: float, exact: bool
) -> None:
    executable = runtime(model)
    executable.reproducible, executable.untapped_offset = False, offset
    assert verify(model, X, target=executable).exact == exact


def test_outputs_must_follow_from_the_last_codes(model: QuantModel) -> None:
    class Tampered(PretendRuntime):
        def _run(self, inputs: Any) -> Any:
            outputs, values = super()._run(inputs)
            return tuple(one * 1.001 for one in outputs), values

    executable = Tampered(runtime(model).request)
    report = verify(model, X, target=executable)
    assert not report.exact
    assert "what the last codes give" in report.failures[0]


def test_a_compiled_batch_splits_the_inputs(model: QuantModel) -> None:
    executable = runtime(model, images())
    report = verify(model, X, target=executable)
    assert report.exact
    assert executable.traced == [6, 6, 6]


def test_flips_count_samples_over_all_inputs(model: QuantModel) -> None:
    executable = runtime(model, images(), exact=False, noise=0.02, stated=0.0201)
    report = verify(model, X, target=executable)
    assert max(flip.index[0] for flip in report.flips) >= 12


def test_inputs_that_do_not_fit_the_compiled_batch(model: QuantModel) -> None:
    with pytest.raises(InvalidArgument, match="7 samples cannot be split into batches of 6"):
        verify(model, X[:7], target=runtime(model, images()))


def test_an_executable_of_another_input_shape() -> None:
    model = qcompile.prepare(Residual()).train()  # captured without examples, so any size will do
    model(X)
    executable = runtime(model, X)
    with pytest.raises(InvalidArgument, match=r"compiled for \(18, 3, 12, 12\)"):
        verify(model, X[:, :, :8, :8], bits=4, target=executable)


def test_bits_must_be_those_of_the_artefact(model: QuantModel) -> None:
    assert verify(model, X, bits=4, target=runtime(model)).mode == 4
    with pytest.raises(InvalidArgument, match="the target is of mode 4, not 2; leave bits out"):
        verify(model, X, bits=2, target=runtime(model))


def test_what_is_no_target(model: QuantModel) -> None:
    with pytest.raises(InvalidInputType, match="not Linear"):
        verify(model, X, target=nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="unknown target 'abacus'; known: pretend"):
        verify(model, X, target="abacus")
