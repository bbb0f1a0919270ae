"""Saving and loading: what comes back, what is read, and what is refused."""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path

import pytest
import torch
from nets import NETWORKS, example, trained

import qcompile
from qcompile.cli.demo import RecordingFile
from qcompile.cli.inspect import describe
from qcompile.errors import FileAccessError, FileFormatError, FoldError, InvalidArgument, InvalidInputType
from qcompile.file.container import Container, Section, write_container
from qcompile.file.graph_json import decode_graph, encode_graph
from qcompile.modes import Mode


class Ranges(io.BytesIO):
    """A file that remembers the end of the furthest read."""

    furthest = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.furthest = max(self.furthest, self.tell())
        return data

    def readinto(self, buffer) -> int:
        count = super().readinto(buffer)
        self.furthest = max(self.furthest, self.tell())
        return count


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    prepared, x = trained("residual")
    path = tmp_path_factory.mktemp("files") / "model.qcm"
    qcompile.save(prepared, path)
    return prepared, x, path


@pytest.mark.parametrize("name", NETWORKS)
def test_every_mode_comes_back_bit_for_bit(name, tmp_path):
    prepared, x = trained(name)
    qcompile.save(prepared, tmp_path / "m.qcm")
    whole = qcompile.load(tmp_path / "m.qcm")
    assert qcompile.modes(whole) == (2, 3, 4)
    for bits in (2, 3, 4):
        expected = qcompile.at(prepared, bits)(x)
        assert torch.equal(qcompile.at(whole, bits)(x), expected)
        assert torch.equal(qcompile.load(tmp_path / "m.qcm", bits=bits)(x), expected)


def test_modes_of_unequal_widths_and_of_eight_bits(tmp_path):
    prepared, x = trained("residual", modes=("w1a2", "w2a2", "w2a8", "w8a8"))
    qcompile.save(prepared, tmp_path / "m.qcm")
    loaded = qcompile.load(tmp_path / "m.qcm")
    assert qcompile.modes(loaded) == ("w1a2", 2, "w2a8", 8)
    for mode in qcompile.modes(loaded):
        assert torch.equal(qcompile.at(loaded, mode)(x), qcompile.at(prepared, mode)(x))


def test_a_low_mode_reads_nothing_behind_its_sections(saved):
    prepared, x, path = saved
    data = path.read_bytes()
    ends = []
    for bits in (2, 3, 4):
        file = Ranges(data)
        loaded = qcompile.load(file, bits=bits)
        assert torch.equal(loaded(x), qcompile.at(prepared, bits)(x))
        with Container.open(path) as container:
            assert file.furthest <= container.end_of(Mode(bits, bits).name)
        ends.append(file.furthest)
    assert ends[0] < ends[1] < ends[2] == len(data)


def test_a_truncated_file_is_the_low_model(saved, tmp_path):
    prepared, x, path = saved
    with Container.open(path) as container:
        end = container.end_of("w2a2")
    (tmp_path / "cut.qcm").write_bytes(path.read_bytes()[:end])
    loaded = qcompile.load(tmp_path / "cut.qcm")
    assert qcompile.modes(loaded) == (2,)
    assert torch.equal(loaded(x), qcompile.at(prepared, 2)(x))
    with pytest.raises(FileFormatError, match=r"truncated or sliced.*w2a2"):
        qcompile.load(tmp_path / "cut.qcm", bits=3)


def test_one_bit_of_weight_costs_one_plane(saved):
    _, _, path = saved
    with Container.open(path) as container:
        sizes = {section.name: section.length for section in container.sections}
    assert sizes["planes:w2a2"] == 2 * sizes["planes:w3a3"] == 2 * sizes["planes:w4a4"]


def test_saving_a_loaded_model_gives_the_same_file(saved, tmp_path):
    _, _, path = saved
    qcompile.save(qcompile.load(path), tmp_path / "again.qcm")
    assert (tmp_path / "again.qcm").read_bytes() == path.read_bytes()


def test_a_loaded_model_does_not_train(saved):
    loaded = qcompile.load(saved[2])
    with pytest.raises(InvalidArgument, match="does not train"):
        loaded.train()
    with pytest.raises(InvalidInputType, match="does not train"):
        qcompile.JointLoss(loaded, torch.nn.CrossEntropyLoss())
    assert list(loaded.parameters()) == []


def test_an_untrained_model_is_not_saved(tmp_path):
    model, x = example("residual")
    with pytest.raises(FoldError, match="calibrate"):
        qcompile.save(qcompile.prepare(model, x), tmp_path / "m.qcm")
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_path_is_one_line(saved, tmp_path):
    with pytest.raises(FileAccessError, match="nowhere"):
        qcompile.save(saved[0], tmp_path / "nowhere" / "m.qcm")


def test_missing_modes_and_shapes_are_named(saved):
    with pytest.raises(InvalidArgument, match="mode 8 was not prepared; this model has: 2, 3, 4"):
        qcompile.load(saved[2], bits=8)
    with pytest.raises(InvalidArgument, match="shape"):
        qcompile.load(saved[2])(torch.randn(1, 3, 13, 12))
    with pytest.raises(FileAccessError, match=r"none\.qcm"):
        qcompile.load("none.qcm")


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "x.qcm").write_bytes(b"PK\x03\x04" + bytes(400))
    with pytest.raises(FileFormatError, match=r"x\.qcm"):
        qcompile.load(tmp_path / "x.qcm")


def _graph(saved) -> tuple[list, dict]:
    graph = saved[0].integer_model(Mode(2, 2))
    return json.loads(json.dumps(encode_graph(graph))), graph.constants()


def _first_call(nodes: list) -> list:
    return next(node for node in nodes if node[1] == "call_function")


def test_graphs_survive_json(saved):
    nodes, constants = _graph(saved)
    rebuilt = decode_graph(nodes, constants, Mode(2, 2))
    assert torch.equal(rebuilt(saved[1])[0], qcompile.at(saved[0], 2)(saved[1]))
    assert encode_graph(rebuilt) == nodes


@pytest.mark.parametrize(
    "target",
    [
        "aten::from_file.",
        "aten::add_.Tensor",
        "aten::rand.",
        "os::system",
        "python::eval",
        "prim::print",
        "aten::relu.nope",
    ],
)
def test_other_operators_may_not_stand_in_a_file(saved, target):
    nodes, constants = _graph(saved)
    call = next(node for node in nodes if node[1] == "call_function")
    call[2] = target
    with pytest.raises(FileFormatError, match="may not stand in a file"):
        decode_graph(nodes, constants, Mode(2, 2))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda nodes: nodes.clear(),
        lambda nodes: nodes.append(nodes[-1]),
        lambda nodes: nodes.pop(),
        lambda nodes: nodes[0].pop(),
        lambda nodes: nodes[0].__setitem__(0, "import os"),
        lambda nodes: nodes[0].__setitem__(1, "call_module"),
        lambda nodes: nodes[3].__setitem__(3, [{"node": "later"}]),
        lambda nodes: nodes[3].__setitem__(3, [{"node": []}]),
        lambda nodes: nodes[3].__setitem__(3, {"a": 1}),
        lambda nodes: nodes[3].__setitem__(5, []),
        lambda nodes: nodes[0].__setitem__(2, "x; import os"),
        lambda nodes: nodes[1].__setitem__(2, "__class__.__init__"),
        lambda nodes: nodes[0].__setitem__(2, "class"),
        lambda nodes: nodes[0].__setitem__(3, [1]),
        lambda nodes: nodes[0].__setitem__(5, {"dtype": 3}),
        lambda nodes: nodes.insert(1, ["y", "placeholder", "y", [{"node": nodes[0][0]}], {"dict": []}, {}]),
        lambda nodes: nodes.insert(1, ["y", "placeholder", "self", [], {"dict": []}, {}]),
        lambda nodes: _first_call(nodes).__setitem__(4, {"dict": [["a=print(), b", 1]]}),
        lambda nodes: _first_call(nodes).__setitem__(4, {"dict": [["a=1)\nprint()\n(b", 1]]}),
        lambda nodes: _first_call(nodes)[3].extend([1] * 20),
    ],
)
def test_malformed_graphs_are_refused(saved, spoil):
    nodes, constants = _graph(saved)
    spoil(nodes)
    with pytest.raises(FileFormatError):
        decode_graph(nodes, constants, Mode(2, 2))


@pytest.mark.parametrize("quote", ['"', "\\"])
def test_names_that_could_leave_a_string_are_refused(saved, quote):
    nodes, constants = _graph(saved)
    name = f"a{quote}b"
    nodes.insert(1, ["y", "get_attr", name, [], {"dict": []}, {}])
    with pytest.raises(FileFormatError, match="reads the constant"):
        decode_graph(nodes, {**constants, name: torch.zeros(1)}, Mode(2, 2))


def _rewritten(saved, folder, change_graph=None, change_model=None) -> Path:
    """The file with another 2-bit graph or model description, all checksums right."""
    with Container.open(saved[2]) as container:
        sections = [Section(s.name, s.kind, container.read(s.name)) for s in container.sections]
        modes, model = container.modes, json.loads(json.dumps(container.model))
    if change_graph is not None:
        nodes, _ = _graph(saved)
        change_graph(nodes)
        packed = zlib.compress(json.dumps(nodes).encode())
        sections = [Section(s.name, s.kind, packed) if s.name == "graph:w2a2" else s for s in sections]
    if change_model is not None:
        change_model(model)
    write_container(folder / "changed.qcm", sections, modes, model, prefix=True)
    return folder / "changed.qcm"


def _make_huge(nodes) -> None:
    place = next(index for index, node in enumerate(nodes) if node[1] == "output")
    call = ["huge", "call_function", "aten::full.", [[100000, 100000, 100], 1.0], {"dict": []}, {}]
    nodes.insert(place, call)
    nodes[place + 1][3] = [[{"node": "huge"}]]


@pytest.mark.parametrize(
    "change",
    [
        _make_huge,
        lambda nodes: _first_call(nodes).__setitem__(3, [[[[1]]]]),
        lambda nodes: _first_call(nodes)[3].__setitem__(1, _first_call(nodes)[3][0]),
    ],
)
def test_graphs_that_cannot_run_or_not_in_memory_are_refused(saved, tmp_path, change):
    with pytest.raises(FileFormatError, match=r"changed\.qcm: .*mode 'w2a2'"):
        qcompile.load(_rewritten(saved, tmp_path, change), bits=2)


@pytest.mark.parametrize(
    "description",
    [
        {"layers": 5},
        {"layers": [1]},
        {"input_shapes": [[]]},
        {"input_shapes": []},
        {"input_shapes": [[2, 7, 6, 6]]},
        {"input_shapes": [[2**30, 1, 2**30, 6]]},
        {"input_shapes": [[2**20, 3, 100, 6]]},
        {"input_shapes": 3},
        {"planes": {"planes:w2a2": [{"name": "a", "shape": [2**31 - 1] * 20_000, "planes": 2}]}},
        {"planes": {"planes:w2a2": [{"name": "a", "shape": [2**30, 2**30], "planes": 2}]}},
        {"planes": {"planes:w2a2": [{"name": "a", "shape": [8], "planes": 2**40}]}},
        {"planes": {"planes:w2a2": [{"name": "a", "shape": [8]}]}},
        {"planes": [1]},
        {"signature": {}},
    ],
)
def test_malformed_descriptions_are_one_short_line(saved, tmp_path, description):
    path = _rewritten(saved, tmp_path, change_model=lambda model: model.update(description))
    for read in (qcompile.load, describe):
        with pytest.raises(FileFormatError, match=r"changed\.qcm") as caught:
            read(path)
        assert len(str(caught.value)) < 500
        assert "\n" not in str(caught.value)


def test_a_graph_that_inflates_too_far_is_refused(saved, tmp_path):
    with Container.open(saved[2]) as container:
        sections = [Section(s.name, s.kind, container.read(s.name)) for s in container.sections]
        bomb = zlib.compress(b" " * (80 << 20), 9)
        spoiled = [Section(s.name, s.kind, bomb) if s.name == "graph:w2a2" else s for s in sections]
        write_container(tmp_path / "bomb.qcm", spoiled, container.modes, container.model, prefix=True)
    with pytest.raises(FileFormatError, match=r"bomb\.qcm: the graph of mode 'w2a2'"):
        qcompile.load(tmp_path / "bomb.qcm", bits=2)


def test_the_recorder_of_the_demo_counts_reads(saved):
    file = RecordingFile(Path(saved[2]).read_bytes())
    qcompile.load(file, bits=2)
    with Container.open(saved[2]) as container:
        assert 0 < file.bytes_read <= container.end_of("w2a2")
