"""Call signatures: binding a call, restoring a result, and their form in a file."""

from __future__ import annotations

import copy
import json
import pickle
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile.errors import InvalidArgument, InvalidInputType
from qcompile.passes.capture import capture
from qcompile.passes.signature import CallSignature

torch.set_num_threads(1)
Point = namedtuple("Point", ["x", "y"])


class Several(nn.Module):
    def forward(self, image: Tensor, more: dict[str, Any], flag: bool = True) -> dict[str, Any]:
        return {"a": image * 2, "b": [(more["ids"] + 1, None)], "flag": flag}


@pytest.fixture(scope="module")
def signature() -> CallSignature:
    example = (torch.randn(2, 3, 4), {"ids": torch.zeros(2, 5, dtype=torch.int64), "extra": (torch.ones(3),)})
    return capture(Several(), example).signature


def call(batch: int = 6) -> tuple[Tensor, dict[str, Any]]:
    return torch.randn(batch, 3, 4), {
        "ids": torch.ones(batch, 5, dtype=torch.int64),
        "extra": (torch.ones(3),),
    }


def test_bind_flattens_in_order(signature: CallSignature) -> None:
    image, more = call()
    for bound in (signature.bind((image, more)), signature.bind((), {"more": more, "image": image})):
        assert [id(tensor) for tensor in bound] == [id(image), id(more["ids"]), id(more["extra"][0])]
    assert [one.shape for one in signature.inputs] == [(None, 3, 4), (None, 5), (3,)]


def test_restore_rebuilds_the_structure(signature: CallSignature) -> None:
    a, b = torch.ones(1), torch.ones(2)
    assert signature.restore((a, b)) == {"a": a, "b": [(b, None)], "flag": True}
    with pytest.raises(InvalidArgument, match="2 outputs, got 1"):
        signature.restore((a,))


def test_bind_names_what_is_wrong(signature: CallSignature) -> None:
    image, more = call()
    with pytest.raises(InvalidArgument, match="input 'more' is missing"):
        signature.bind((image,))
    with pytest.raises(InvalidArgument, match="3 positional inputs, got 4"):
        signature.bind((image, more, True, 1))
    with pytest.raises(InvalidArgument, match="input 'image' was given by position and by name"):
        signature.bind((image, more), {"image": image})
    with pytest.raises(InvalidArgument, match="input 'mask' was not among the inputs at capture"):
        signature.bind((image, more), {"mask": image})
    with pytest.raises(
        InvalidInputType, match=r"'image' has dtype torch.float64 .* pass image.to\(torch.float32\)"
    ):
        signature.bind((image.double(), more))
    with pytest.raises(
        InvalidArgument, match=r"'image' has shape \(6, 3\) but was captured as \(batch, 3, 4\)"
    ):
        signature.bind((image[:, :, 0], more))
    with pytest.raises(InvalidArgument, match=r"'image' has shape \(6, 3, 2\)"):
        signature.bind((image[..., :2], more))
    with pytest.raises(InvalidArgument, match="input 'more' has structure"):
        signature.bind((image, {"ids": more["ids"]}))
    with pytest.raises(InvalidInputType, match="input 'image' must be a tensor, got list"):
        signature.inputs[0].check([1.0])


def test_binding_without_examples_checks_tensors_only() -> None:
    class Add(nn.Module):
        def forward(self, a: Tensor, b: Tensor, scale: float = 2.0) -> Tensor:
            return a + b * scale

    signature = capture(Add()).signature
    x, y = torch.randn(2), torch.randn(3, 2).double()
    assert signature.bind((x,), {"b": y})[1] is y
    with pytest.raises(InvalidInputType, match="input 'b' must be a tensor, got int"):
        signature.bind((x, 3))


def test_json_round_trip(signature: CallSignature) -> None:
    again = CallSignature.from_json(json.loads(json.dumps(signature.to_json())))
    assert again == signature
    image, more = call()
    assert again.bind((image, more))[0] is image
    assert again.restore((image, image)) == signature.restore((image, image))


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own way to unpickle
def test_copies_are_equal(signature: CallSignature) -> None:
    assert copy.deepcopy(signature) == signature
    assert pickle.loads(pickle.dumps(signature)) == signature


class Named(nn.Module):
    def forward(self, x: Tensor) -> Point:
        return Point(x * 2, x + 1)


def test_named_structures_keep_their_names() -> None:
    signature = capture(Named(), torch.randn(2, 3)).signature
    x, y = torch.ones(1), torch.zeros(1)
    assert signature.restore((x, y)) == Point(x, y)
    again = CallSignature.from_json(json.loads(json.dumps(signature.to_json()))).restore((x, y))
    first, second = again
    assert again._fields == Point._fields
    assert first is x
    assert second is y


class Answer(dict):
    """A mapping of the user's own type, as language models return."""


torch.utils._pytree.register_pytree_node(
    Answer,
    lambda answer: (list(answer.values()), list(answer)),
    lambda values, names: Answer(zip(names, values, strict=True)),
)


def test_types_of_the_user_become_records() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Answer:
            return Answer(logits=x * 2, hidden=(x + 1, x))

    signature = capture(Model(), torch.randn(2, 3)).signature
    x, y, z = torch.ones(1), torch.zeros(1), torch.ones(2)
    assert isinstance(signature.restore((x, y, z)), Answer)
    again = CallSignature.from_json(json.loads(json.dumps(signature.to_json()))).restore((x, y, z))
    assert again.logits is again["logits"] is again[0] is x
    assert again.hidden == (y, z)
    with pytest.raises(AttributeError, match="no 'loss'; it has logits, hidden"):
        _ = again.loss


def test_structures_that_json_cannot_express_are_named() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> dict[int, Tensor]:
            return {1: x * 2}

    signature = capture(Model(), torch.randn(2, 3)).signature
    with pytest.raises(InvalidArgument, match="the output holds a dict, which a file cannot express"):
        signature.to_json()


DAMAGE: dict[str, Any] = {
    "no inputs": lambda data: data.pop("inputs"),
    "input that is no object": lambda data: data.update(inputs=[3]),
    "unknown dtype": lambda data: data["inputs"][0].update(dtype="load"),
    "negative size": lambda data: data["inputs"][0].update(shape=[-1]),
    "tensor out of range": lambda data: data["parameters"][0].update(tree={"tensor": 9}),
    "tensor twice": lambda data: data["parameters"][0].update(tree={"tuple": [{"tensor": 0}, {"tensor": 0}]}),
    "unknown kind": lambda data: data.update(output={"code": "x"}),
    "gap in outputs": lambda data: data.update(output={"tuple": [{"tensor": 0}, {"tensor": 2}]}),
    "dict without pairs": lambda data: data.update(output={"dict": ["a"]}),
    "positional that is no list": lambda data: data.update(positional="image"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_json_is_refused(signature: CallSignature, damage: str) -> None:
    data = json.loads(json.dumps(signature.to_json()))
    DAMAGE[damage](data)
    with pytest.raises(InvalidArgument, match="call signature"):
        CallSignature.from_json(data)


def test_deep_json_is_refused(signature: CallSignature) -> None:
    data = signature.to_json()
    for _ in range(100):
        data["output"] = {"tuple": [data["output"]]}
    with pytest.raises(InvalidArgument, match="call signature"):
        CallSignature.from_json(data)
