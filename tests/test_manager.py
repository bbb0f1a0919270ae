"""The pass infrastructure: conditions, errors, log and dump."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from qcompile.errors import InvalidArgument, PassError, PostconditionError, PreconditionError
from qcompile.passes.manager import Condition, Pass, PassManager, PassResult


def _graph() -> fx.GraphModule:
    return fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def _has_relu(graph_module: fx.GraphModule) -> str | None:
    names = [str(node.target) for node in graph_module.graph.nodes]
    return None if any("1" in name for name in names) else f"its nodes are {names}"


HAS_RELU = Condition("has a ReLU", _has_relu)


class DropRelu(Pass):
    """Remove the ReLU."""

    requires = (HAS_RELU,)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        node = next(n for n in graph_module.graph.nodes if str(n.target) == "1")
        node.replace_all_uses_with(node.args[0])
        graph_module.graph.erase_node(node)
        return PassResult(graph_module, True, ("dropped 1",))


class Liar(DropRelu):
    """Promises what it breaks."""

    ensures = (HAS_RELU,)


class Fails(Pass):
    """Fails with an error that is not ours."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        raise KeyError("gone\nsecond line")


class Breaks(Pass):
    """Leaves a graph that does not hold together."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        nodes = list(graph_module.graph.nodes)
        nodes[1].append(nodes[0])
        return PassResult(graph_module, True)


def test_a_pass_rewrites_and_reports():
    result = PassManager([DropRelu()])(_graph())
    assert result.modified
    assert result.notes == ("DropRelu: dropped 1",)
    x = torch.randn(3, 2)
    torch.testing.assert_close(result.graph_module(x), result.graph_module.get_submodule("0")(x))


def test_requirements_are_checked_before():
    manager = PassManager([DropRelu(), DropRelu()])
    with pytest.raises(PreconditionError, match="DropRelu requires that the graph has a ReLU: its nodes are"):
        manager(_graph())


def test_promises_are_checked_on_the_result():
    with pytest.raises(PostconditionError, match="Liar promised that the graph has a ReLU"):
        Liar()(_graph())


def test_foreign_errors_are_wrapped_with_their_cause_in_one_line():
    with pytest.raises(PassError, match=r"Fails failed: 'gone") as caught:
        Fails()(_graph())
    assert isinstance(caught.value.__cause__, KeyError)
    assert "\n" not in str(caught.value)


def test_a_broken_graph_is_caught():
    with pytest.raises(PassError, match="Breaks failed"):
        Breaks()(_graph())


def test_own_errors_pass_through():
    class Refuses(Pass):
        def call(self, graph_module: fx.GraphModule) -> PassResult:
            raise InvalidArgument("no")

    with pytest.raises(InvalidArgument, match=r"^no$"):
        Refuses()(_graph())


def test_the_log_has_one_line_per_pass(monkeypatch, capsys):
    monkeypatch.setenv("QCOMPILE_LOG", "passes")
    PassManager([DropRelu()])(_graph())
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("qcompile.passes: DropRelu: modified, 4 -> 3 nodes")
    assert "dropped 1" in lines[1]


def test_without_the_variable_nothing_is_printed(monkeypatch, capsys):
    monkeypatch.delenv("QCOMPILE_LOG", raising=False)
    PassManager([DropRelu()])(_graph())
    assert capsys.readouterr().err == ""


def test_graphs_are_dumped_before_and_after(tmp_path, monkeypatch):
    PassManager([DropRelu()], dump=tmp_path / "a")(_graph())
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "00-DropRelu-after.txt",
        "00-DropRelu-before.txt",
    ]
    assert "_1" in (tmp_path / "a" / "00-DropRelu-before.txt").read_text()
    monkeypatch.setenv("QCOMPILE_DUMP", str(tmp_path / "b"))
    PassManager([DropRelu()])(_graph())
    assert len(list((tmp_path / "b").iterdir())) == 2
