"""What `verify` reports, and what it leaves as it was."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn
from verify_networks import Residual, copied, find, images, trained

from qcompile.errors import FoldError, InvalidArgument, InvalidInputType
from qcompile.model import QuantModel
from qcompile.verify import VerificationReport, inputs, verify


@pytest.fixture(scope="module")
def model() -> QuantModel:
    return trained(Residual, images())


@pytest.fixture(scope="module")
def failed(model: QuantModel) -> VerificationReport:
    graph = copied(model)
    find(graph, "requantize", "block2.conv1").update_arg(3, 3)
    graph.recompile()
    return verify(model, images(), target=graph)


def test_the_report_is_json(failed: VerificationReport) -> None:
    data = json.loads(json.dumps(failed.to_dict(), allow_nan=False))
    assert data["exact"] is False
    assert data["mode"] == 4
    assert data["failures"] == list(failed.failures)
    assert {check["layer"] for check in data["layers"]} == {check.layer for check in failed.layers}


def test_the_report_reads_as_text(model: QuantModel, failed: VerificationReport) -> None:
    sound = str(verify(model, images()))
    assert sound.startswith("integer graph, mode 4: exact (6 samples)")
    assert "block1.conv1.input_quantizer" in sound
    assert "end to end: 0 of " in sound
    text = str(failed)
    assert "NOT exact" in text
    assert "WRONG" in text
    assert "FAILED layer 'block2.conv1.input_quantizer': shift is 3, expected " in text


def test_a_failure_tells_where_and_what(failed: VerificationReport) -> None:
    wrong = next(one for one in failed.layers if not one.exact)
    assert wrong.layer == "block2.conv1.input_quantizer"
    assert wrong.first_mismatch is not None
    assert wrong.first_mismatch.startswith("at [0, ")
    # downstream operators are exact for what they were fed
    assert [one.layer for one in failed.layers if not one.exact] == [wrong.layer]
    assert {one.behind for one in failed.end_to_end.differences} == {None, "difference"}


def test_the_report_is_frozen(failed: VerificationReport) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        failed.exact = True  # type: ignore[misc]


def test_training_flags_mode_and_shapes_are_restored() -> None:
    model = trained(Residual, images(), steps=1)
    model.train()
    model.block1.bn1.eval()
    model.active, model.last_shapes = model.prepared_modes[1], ((5, 3, 12, 12),)
    flags = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert verify(model, images()).mode == 3
    assert verify(model, images(), bits=2).mode == 2
    assert [module.training for module in model.modules()] == flags
    assert model.last_shapes == ((5, 3, 12, 12),)
    assert model.active.label == 3
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_flags_are_restored_after_an_error() -> None:
    model = trained(Residual, images(), steps=1)
    model.train()
    model.block1.conv1.input_quantizer.initialised.zero_()
    with pytest.raises(FoldError, match="was never set"):
        verify(model, images())
    assert model.training


def test_inputs_are_checked_in_pieces(model: QuantModel, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.cat([images(), 2 * images()])
    whole = verify(model, x)
    monkeypatch.setattr(inputs, "PIECE_SAMPLES", 5)
    pieces = verify(model, x)
    assert pieces.exact
    assert pieces.layers == whole.layers
    assert pieces.end_to_end.codes_compared == whole.end_to_end.codes_compared


def test_large_samples_make_small_pieces() -> None:
    assert inputs.piece_samples([torch.empty(64, 3, 32, 32, device="meta")], 64) == 32
    assert inputs.piece_samples([torch.empty(64, 3, 224, 224, device="meta")], 64) == 3
    assert inputs.piece_samples([torch.empty(64, 3, 2048, 2048, device="meta")], 64) == 1


def test_tuples_and_names_bind_like_a_call(model: QuantModel) -> None:
    assert verify(model, (images(),)).exact
    assert verify(model, {"x": images()}).exact


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (images(2, 9), InvalidArgument, "input 'x' has shape"),
        (images().double(), InvalidInputType, "dtype"),
        (images().numpy(), InvalidInputType, "must be a tensor"),
        ((images(), images()), InvalidArgument, "takes 1 positional inputs, got 2"),
        (images()[:0], InvalidArgument, "holds no sample"),
    ],
)
def test_inputs_that_do_not_fit(model: QuantModel, x: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        verify(model, x)
    assert "\n" not in str(raised.value)


def test_an_unknown_mode(model: QuantModel) -> None:
    with pytest.raises(InvalidArgument, match="mode 7 was not prepared; this model has: 2, 3, 4"):
        verify(model, images(), bits=7)


def test_an_unprepared_model() -> None:
    with pytest.raises(InvalidInputType, match=r"expected a model from qcompile\.prepare"):
        verify(nn.Linear(2, 2), images())
