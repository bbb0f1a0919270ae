"""Modes: names, switching, views."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from nets import NETWORKS, example, trained

import qcompile
from qcompile.errors import FoldError, InvalidArgument, InvalidInputType, QCompileError
from qcompile.modes import Mode, parse_modes


def test_labels_are_widths_or_names():
    model, x = example("residual")
    assert qcompile.modes(qcompile.prepare(model, x)) == (2, 3, 4)
    assert qcompile.modes(qcompile.prepare(model, x, modes=("w2a2", "w2a4", "w4a8"))) == (2, "w2a4", "w4a8")


@pytest.mark.parametrize("bits", [(0, 2), (2, 9), (4, 2), (2, 2), (), ("x",), (2.0,), (True,)])
def test_bad_widths_are_refused(bits):
    with pytest.raises(InvalidArgument):
        parse_modes(bits, None)


def test_highest_mode_is_active_and_switching_keeps_every_bit():
    prepared, x = trained("residual")
    first = {bits: prepared(x) for bits in (4,)}
    outputs = {}
    for bits in (2, 3, 4):
        qcompile.set_bits(prepared, bits)
        outputs[bits] = prepared(x)
    assert torch.equal(outputs[4], first[4])
    assert not torch.equal(outputs[2], outputs[4])
    for bits in (4, 2, 3):
        with qcompile.bits(prepared, bits) as same:
            assert same is prepared
            assert torch.equal(prepared(x), outputs[bits])
    assert torch.equal(prepared(x), outputs[4])


def test_switching_touches_no_tensor():
    prepared, _ = trained("residual")
    before = {name: (p.data_ptr(), p._version) for name, p in prepared.state_dict().items()}
    qcompile.set_bits(prepared, 2)
    assert {name: (p.data_ptr(), p._version) for name, p in prepared.state_dict().items()} == before


def test_the_previous_mode_returns_after_an_error():
    prepared, _ = trained("residual")
    with pytest.raises(KeyError), qcompile.bits(prepared, 2):
        raise KeyError
    assert prepared.active == Mode(4, 4)


def test_an_unprepared_mode_lists_the_choices():
    prepared, _ = trained("residual")
    with pytest.raises(InvalidArgument, match="mode 5 was not prepared; this model has: 2, 3, 4"):
        qcompile.set_bits(prepared, 5)


def test_views_share_parameters_and_run_in_threads():
    prepared, x = trained("residual")
    expected = {bits: qcompile.at(prepared, bits)(x) for bits in (2, 3, 4)}
    view = qcompile.at(prepared, 2)
    assert {p.data_ptr() for p in view.parameters()} == {p.data_ptr() for p in prepared.parameters()}
    results: list[bool] = []

    def work(bits: int) -> None:
        results.extend(torch.equal(qcompile.at(prepared, bits)(x), expected[bits]) for _ in range(5))

    threads = [threading.Thread(target=work, args=(bits,)) for bits in (2, 3, 4, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 30


@pytest.mark.parametrize("name", NETWORKS)
def test_eval_mode_runs_the_integers_that_training_approximates(name):
    prepared, x = trained(name, steps=4)
    for bits in (2, 3, 4):
        integers = qcompile.at(prepared, bits)(x)
        prepared.training = True  # the root alone: float chain, batch normalisation in eval mode
        floats = qcompile.at(prepared, bits)(x)
        prepared.training = False
        # rounding differs, so a value near a tie may fall to the other side; most agree to float precision
        assert float((integers - floats).abs().median()) < 2e-2 * float(floats.abs().max())


def test_eval_before_any_data_says_what_to_do():
    model, x = example("residual")
    prepared = qcompile.prepare(model, x).eval()
    with pytest.raises(FoldError, match=r"qcompile\.calibrate"):
        prepared(x)


def test_the_fold_follows_every_kind_of_write():
    prepared, x = trained("residual")
    seen = [prepared(x)]
    with torch.no_grad():
        prepared.get_submodule("bn1").bias.add_(0.5)
    seen.append(prepared(x))
    prepared.get_submodule("bn1").bias.data.mul_(3.0)
    seen.append(prepared(x))
    prepared.get_submodule("conv1").weight_quantizer.step.data.mul_(0.5)
    seen.append(prepared(x))
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))


def test_other_spatial_sizes_fold_again():
    model, x = example("residual")
    prepared = qcompile.prepare(model).train()  # captured by torch.fx, which leaves all sizes open
    prepared(x)
    for bits in (2, 3):
        qcompile.at(prepared, bits)(x)
    prepared.eval()
    large = torch.randn(2, 3, 20, 16)
    for inputs in (x, large):
        prepared.training = True
        expected = prepared(inputs)
        prepared.training = False
        assert float((prepared(inputs) - expected).abs().median()) < 2e-2 * float(expected.abs().max())


def test_a_float_model_is_refused():
    with pytest.raises(InvalidInputType, match=r"qcompile\.prepare"):
        qcompile.modes(torch.nn.Linear(2, 2))


def test_unknown_scheme_and_layer_list_the_choices():
    model, x = example("residual")
    with pytest.raises(InvalidArgument, match=r"unknown scheme 'horizontal'; known: .*vertical"):
        qcompile.prepare(model, x, scheme="horizontal")
    with pytest.raises(InvalidArgument, match=r"skip names 'convX'.*conv1"):
        qcompile.prepare(model, x, skip=["convX"])


def test_skip_and_first_and_last_stay_float():
    model, x = example("residual")
    prepared = qcompile.prepare(model, x, skip=["down"])
    states = {record.name: record.quantized for record in prepared.records}
    assert states == {
        "stem": False,
        "conv1": True,
        "conv2": True,
        "down": False,
        "conv3": True,
        "head": False,
    }


def test_nothing_left_to_quantise_is_an_error():
    with pytest.raises(InvalidArgument, match="nothing to quantise"):
        qcompile.prepare(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), torch.randn(2, 4))


def test_errors_share_a_base():
    model, x = example("residual")
    with pytest.raises(QCompileError):
        qcompile.prepare(model, x, bits=(3, 2))
    with pytest.raises(ValueError):
        qcompile.prepare(model, x, bits=(3, 2))
