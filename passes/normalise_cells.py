"""Recurrent cells, one step of LSTM, GRU or RNN, as linear layers and gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import fx

from qcompile.passes.aten import arguments_of, aten_name
from qcompile.passes.manager import Pass, PassResult
from qcompile.passes.normalise_inplace import FUNCTIONAL

_aten = torch.ops.aten

#: Makes a call of an operator.
Call: TypeAlias = Callable[..., fx.Node]


class CellsAsLinear(Pass):
    """`lstm_cell`, `gru_cell`, `rnn_tanh_cell` and `rnn_relu_cell` become two `linear` and what follows.

    With linear(x) and linear(h) of as many features as there are gates:

        lstm  c' = sigmoid(f) c + sigmoid(i) tanh(g),  h' = sigmoid(o) tanh(c'),  (i, f, g, o) = their sum
        gru   h' = n + z (h - n),  r, z = sigmoid of the sums,  n = tanh(x_n + r h_n)
        rnn   h' = tanh or relu of the sum
    """

    requires = (FUNCTIONAL,)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite in place."""
        graph = graph_module.graph
        cells = [node for node in graph.nodes if aten_name(node) in _CELLS]
        for node in cells:
            meta = {key: entry for key, entry in node.meta.items() if key != "val"}

            def call(target: Any, *args: Any, meta: dict[str, Any] = meta) -> fx.Node:
                made = graph.call_function(target, args)
                made.meta = dict(meta)
                return made

            with graph.inserting_before(node):
                results = _CELLS[aten_name(node)](call, arguments_of(node))
            if aten_name(node) == "lstm_cell":
                for user in list(node.users):  # a pair
                    user.replace_all_uses_with(results[user.args[1]])
                    graph.erase_node(user)
            else:
                node.replace_all_uses_with(results[0])
            graph.erase_node(node)
        return PassResult(graph_module, bool(cells))


def _sides(call: Call, given: Any, hidden: fx.Node) -> tuple[fx.Node, fx.Node]:
    """linear(x) and linear(h)."""
    x = call(_aten.linear.default, given["input"], given["w_ih"], given["b_ih"])
    return x, call(_aten.linear.default, hidden, given["w_hh"], given["b_hh"])


def _parts(call: Call, gates: fx.Node, count: int) -> list[fx.Node]:
    """Equal parts of the last dimension."""
    unflat = call(_aten.unflatten.int, gates, -1, [count, -1])
    return [call(_aten.select.int, unflat, -2, index) for index in range(count)]


def _lstm(call: Call, given: Any) -> list[fx.Node]:
    hidden, cell = given["hx"]
    gates = call(_aten.add.Tensor, *_sides(call, given, hidden))
    i, f, g, o = _parts(call, gates, 4)
    kept = call(_aten.mul.Tensor, call(_aten.sigmoid.default, f), cell)
    new = call(_aten.mul.Tensor, call(_aten.sigmoid.default, i), call(_aten.tanh.default, g))
    state = call(_aten.add.Tensor, kept, new)
    output = call(_aten.mul.Tensor, call(_aten.sigmoid.default, o), call(_aten.tanh.default, state))
    return [output, state]


def _gru(call: Call, given: Any) -> list[fx.Node]:
    hidden = given["hx"]
    ours, theirs = (_parts(call, side, 3) for side in _sides(call, given, hidden))
    reset, update = (
        call(_aten.sigmoid.default, call(_aten.add.Tensor, ours[index], theirs[index])) for index in (0, 1)
    )
    new = call(_aten.tanh.default, call(_aten.add.Tensor, ours[2], call(_aten.mul.Tensor, reset, theirs[2])))
    change = call(_aten.mul.Tensor, update, call(_aten.sub.Tensor, hidden, new))
    return [call(_aten.add.Tensor, new, change)]


def _rnn(activation: Any) -> Callable[[Call, Any], list[fx.Node]]:
    def cell(call: Call, given: Any) -> list[fx.Node]:
        return [call(activation, call(_aten.add.Tensor, *_sides(call, given, given["hx"])))]

    return cell


_CELLS: dict[str, Callable[[Call, Any], list[fx.Node]]] = {
    "lstm_cell": _lstm,
    "gru_cell": _gru,
    "rnn_tanh_cell": _rnn(_aten.tanh.default),
    "rnn_relu_cell": _rnn(_aten.relu.default),
}
