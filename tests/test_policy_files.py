"""Files that hold policies: what they hold, what they give back, what is refused."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import trained

import qcompile
from qcompile.errors import FileFormatError, InvalidArgument, InvalidInputType
from qcompile.file.container import Container
from qcompile.file.header import ModeEntry
from qcompile.file.writer import write_container
from qcompile.pack import plane_bytes

torch.set_num_threads(1)

LAYERS = ("conv1", "conv2", "down", "conv3")
FIRST = qcompile.Policy({"conv1": 2, "conv2": 3, "down": 3, "conv3": 2})
SECOND = qcompile.Policy({"conv1": 3, "conv2": 2, "down": 3, "conv3": 3})


def _model(scheme="vertical"):
    model, x = trained("residual", scheme=scheme)
    return model.eval(), x, [qcompile.calibrate(model, [x], policy=one) for one in (FIRST, SECOND)]


def _plane_bytes(path):
    with Container.open(path) as container:
        return {one.name: one.length for one in container.sections if one.kind == "planes"}


@pytest.mark.parametrize(
    "scheme",
    ["vertical", "coupled", *(pytest.param(one, marks=pytest.mark.slow) for one in ("quantizable", "n2uq"))],
)
@pytest.mark.parametrize("wanted", [("a",), ("b", "a"), (2, 3, "a", "b")])
def test_files_give_policies_back_bit_for_bit(scheme, wanted, tmp_path):
    model, x, (first, second) = _model(scheme)
    chosen = [{"a": first, "b": second}.get(one, one) for one in wanted]
    qcompile.save(model, tmp_path / "m.qcm", modes=chosen)
    loaded = qcompile.load(tmp_path / "m.qcm")
    names = [f"policy-{number + 1}" for number in range(sum(isinstance(one, str) for one in wanted))]
    assert qcompile.modes(loaded) == (*(one for one in wanted if isinstance(one, int)), *names)
    for one in chosen:
        expected = qcompile.at(model, one)(x)
        assert torch.equal(qcompile.at(loaded, one)(x), expected)
    # the last is the active one, and is loaded alone by its name
    assert torch.equal(loaded(x), qcompile.at(model, chosen[-1])(x))
    alone = qcompile.load(tmp_path / "m.qcm", bits=names[-1])
    assert qcompile.modes(alone) == (names[-1],)
    assert torch.equal(alone(x), loaded(x))
    qcompile.save(loaded, tmp_path / "again.qcm")
    again = qcompile.load(tmp_path / "again.qcm")
    for one in chosen:
        assert torch.equal(qcompile.at(again, one)(x), qcompile.at(model, one)(x))


@pytest.mark.parametrize("scheme", ["vertical", "coupled"])
def test_a_file_holds_only_the_planes_of_its_policy(scheme, tmp_path):
    model, _, (first, _) = _model(scheme)
    qcompile.save(model, tmp_path / "m.qcm", modes=[first])
    needed = sum(
        mode.weight_bits * plane_bytes(model.get_submodule(name).weight.numel()) for name, mode in first.items
    )
    if scheme == "coupled":
        needed += sum(8 * plane_bytes(model.get_submodule(name).weight.numel()) for name in ("stem", "head"))
    assert sum(_plane_bytes(tmp_path / "m.qcm").values()) == needed


choices = st.lists(st.tuples(*[st.sampled_from((2, 3, 4))] * 4), min_size=1, max_size=4, unique=True)


@given(choices, st.booleans())
@settings(max_examples=10, deadline=None)
@pytest.mark.filterwarnings("ignore:policy .* has no batch normalisation statistics")
def test_no_plane_is_stored_twice(tmp_path_factory, bits, with_mode):
    model, x, _ = _model()
    policies = [qcompile.Policy(dict(zip(LAYERS, one, strict=True))) for one in bits]
    chosen = [*([3] if with_mode else []), *policies]
    path = tmp_path_factory.mktemp("files") / "m.qcm"
    qcompile.save(model, path, modes=chosen)
    most = [max(column) for column in zip(*bits, *([(3,) * 4] if with_mode else []), strict=True)]
    sizes = [plane_bytes(model.get_submodule(name).weight.numel()) for name in LAYERS]
    assert sum(_plane_bytes(path).values()) == sum(a * b for a, b in zip(most, sizes, strict=True))
    loaded = qcompile.load(path)
    for one in chosen:
        assert torch.equal(qcompile.at(loaded, one)(x), qcompile.at(model, one)(x))


@pytest.mark.parametrize("target", ["onnx-qdq", "x86"])
def test_stored_policies_lower_and_verify(target, tmp_path):
    model, x, (first, _) = _model()
    qcompile.save(model, tmp_path / "m.qcm", modes=[first])
    loaded = qcompile.load(tmp_path / "m.qcm")
    assert qcompile.verify(loaded, x, bits="policy-1", target=target).exact
    run = qcompile.lower(tmp_path / "m.qcm", target, bits="policy-1", batch=len(x))
    torch.testing.assert_close(run(x), loaded(x), rtol=1e-5, atol=1e-6)
    again = qcompile.lower(tmp_path / "m.qcm", target, bits=FIRST, batch=len(x))  # the same modes
    torch.testing.assert_close(again(x), loaded(x), rtol=1e-5, atol=1e-6)


def test_weight_coupling_stores_the_active_policy_or_equal_bits(tmp_path):
    model, _, (first, _) = _model("coupled")
    qcompile.save(model, tmp_path / "all.qcm")
    assert qcompile.modes(qcompile.load(tmp_path / "all.qcm")) == (2, 3, 4, 5, 6)
    with qcompile.bits(model, first):
        qcompile.save(model, tmp_path / "one.qcm")
    assert qcompile.modes(qcompile.load(tmp_path / "one.qcm")) == ("policy-1",)
    qcompile.save(model, tmp_path / "every.qcm", modes=qcompile.modes(model))
    loaded = qcompile.load(tmp_path / "every.qcm")
    assert qcompile.modes(loaded) == qcompile.modes(model)
    names = list(_plane_bytes(tmp_path / "every.qcm"))
    assert len(names) == len(set(names))


def test_what_a_file_lacks_is_listed(tmp_path):
    model, x, (first, second) = _model()
    qcompile.save(model, tmp_path / "m.qcm", modes=[3, first])
    loaded = qcompile.load(tmp_path / "m.qcm")
    with pytest.raises(InvalidArgument, match=r"does not hold that policy .*it has: 3, policy-1"):
        qcompile.set_bits(loaded, second)
    for wrong in (2, "policy-2"):
        with pytest.raises(InvalidArgument, match=r"it has: 3, policy-1|model has: 3, policy-1"):
            qcompile.set_bits(loaded, wrong)
        with pytest.raises(InvalidArgument, match=r"it has: 3, policy-1|model has: 3, policy-1"):
            qcompile.load(tmp_path / "m.qcm", bits=wrong)
    with pytest.raises(InvalidInputType, match="modes is a sequence"):
        qcompile.save(model, tmp_path / "n.qcm", modes=first)
    with pytest.raises(InvalidArgument, match="says nothing of layer"):
        qcompile.save(model, tmp_path / "n.qcm", modes=[qcompile.Policy({"conv1": 2})])
    assert not (tmp_path / "n.qcm").exists()
    assert torch.equal(loaded(x), qcompile.at(model, first)(x))


@pytest.mark.parametrize(
    "policies",
    [
        [],
        {"policy-1": 7},
        {"policy-1": {"conv1": "w99a1"}},
        {"policy-1": {"conv1": None}},
        {"other": {"conv1": 2}},
        {"policy-1": {"conv1": 2}, "policy.2": {"conv1": 2}},
    ],
)
def test_hostile_descriptions_of_policies_are_refused(policies, tmp_path):
    model, _, (first, _) = _model()
    qcompile.save(model, tmp_path / "m.qcm", modes=[first])
    _rewrite(tmp_path / "m.qcm", tmp_path / "bad.qcm", {"policies": policies})
    with pytest.raises(FileFormatError, match=r"bad\.qcm"):
        qcompile.load(tmp_path / "bad.qcm")


def test_a_policy_with_bits_of_its_own_contradicts_itself(tmp_path):
    model, _, (first, _) = _model()
    qcompile.save(model, tmp_path / "m.qcm", modes=[first])
    _rewrite(tmp_path / "m.qcm", tmp_path / "bad.qcm", {}, bits=(3, 3))
    with pytest.raises(FileFormatError, match="contradicts its bit-widths"):
        qcompile.load(tmp_path / "bad.qcm")


def _rewrite(source, path, changes, bits=(None, None)):
    """The same sections under another description."""
    from qcompile.file.container import Section

    with Container.open(source) as container:
        sections = [Section(one.name, one.kind, container.read(one.name)) for one in container.sections]
        entries = [ModeEntry(one.name, *bits, one.sections) for one in container.modes]
        write_container(path, sections, entries, {**json.loads(json.dumps(container.model)), **changes})


def test_names_of_many_modes_stay_short_and_differ(tmp_path):
    from qcompile.file.plane_sections import PlaneSection

    many = [f"w{w}a{a}" for w, a in itertools.product(range(1, 9), range(1, 9))]
    names = {PlaneSection(tuple(many[:count]), ()).name for count in range(1, 65)}
    assert len(names) == 64
    assert max(map(len, names)) <= 150
