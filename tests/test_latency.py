"""Latencies of layers and policies, and peak bytes of activations."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from nets import example, trained

import qcompile
from qcompile import latency
from qcompile.errors import InvalidArgument
from qcompile.latency import LatencyTable, latency_table
from qcompile.modes import Mode
from qcompile.peak_bytes import peak_activation_bytes
from qcompile.policy_costs import policy_costs
from qcompile.random_tensors import random_tensors
from qcompile.search.budget import parse_budget

torch.set_num_threads(1)

MODES = (Mode(2, 2), Mode(3, 3), Mode(4, 4))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def tables(kernels, monkeypatch):
    """Where tables are kept, empty at first; kernels stay."""
    monkeypatch.setenv("QCOMPILE_CACHE", str(kernels))
    monkeypatch.setattr(latency, "RUNS", 2)
    shutil.rmtree(kernels / "latency", ignore_errors=True)
    return kernels / "latency"


@pytest.fixture(scope="module")
def model():
    found, _ = trained("residual")
    return found.eval()


@pytest.mark.parametrize("target", [pytest.param("x86", marks=pytest.mark.slow), "onnx-qdq"])
def test_a_table_has_every_layer_at_every_mode(model, target):
    costs = policy_costs(model, target)
    table = costs.table
    assert table.measured
    assert table.target == target
    assert set(table.layers) == {"conv1", "conv2", "down", "conv3"}
    for by_mode in table.layers.values():
        assert set(by_mode) == {"w2a2", "w3a3", "w4a4"}
        assert all(0 < seconds < 1 for seconds in by_mode.values())
    policy = qcompile.Policy({"conv1": 2, "conv2": 3, "down": 4, "conv3": 2})
    # conv1 reads the tensor of down, which has 4 bits; (2, 4) was not prepared, so (2, 2) stands for it
    parts = [table.layers[name][mode.name] for name, mode in policy.items]
    assert costs.total(policy, "latency") == pytest.approx(sum(parts) + table.rest)
    least, most = costs.bounds("latency")
    assert least <= costs.total(policy, "latency") <= most


def test_a_table_is_measured_once(model, monkeypatch):
    first = policy_costs(model, "onnx-qdq").table
    monkeypatch.setattr(latency, "lower", lambda *_, **__: pytest.fail("measured again"))
    assert policy_costs(model, "onnx-qdq").table == first
    monkeypatch.setattr(latency, "machine_name", lambda: "another machine")
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        policy_costs(model, "onnx-qdq")


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"layers": 3}', '{"layers": {"a": {"w2a2": "x"}}}'])
def test_a_spoilt_cache_is_measured_again(model, content, tables):
    first = policy_costs(model, "x86").table
    (path,) = tables.iterdir()
    path.write_text(content)
    again = policy_costs(model, "x86").table
    assert again.layers.keys() == first.layers.keys()
    assert json.loads(path.read_text())["target"] == "x86"


@pytest.mark.slow
def test_other_shapes_have_tables_of_their_own(model, tables):
    policy_costs(model, "x86")
    net, _ = example("residual")
    larger = qcompile.prepare(net, torch.randn(2, 3, 20, 20)).train()
    larger(torch.randn(2, 3, 20, 20))
    qcompile.calibrate(larger, [torch.randn(2, 3, 20, 20)])
    policy_costs(larger.eval(), "x86")
    assert len(list(tables.iterdir())) == 2


@pytest.mark.slow
def test_where_code_cannot_run_estimates_count(model):
    table = policy_costs(model, "arm").table
    assert not table.measured
    assert all(seconds > 0 for by_mode in table.layers.values() for seconds in by_mode.values())


def test_bits_that_were_not_prepared_take_the_nearest():
    table = LatencyTable("x86", "here", True, {"a": {"w2a2": 1.0, "w4a4": 2.0, "w2a6": 3.0}}, 0.0)
    assert table.seconds("a", Mode(2, 3)) == 1.0
    assert table.seconds("a", Mode(2, 5)) == 3.0
    assert table.seconds("a", Mode(4, 2)) == 2.0
    assert table.seconds("a", Mode(8, 4)) == 2.0
    assert table.seconds("unknown", Mode(2, 2)) == 0.0


def test_budgets_in_milliseconds_name_a_target(model):
    costs = policy_costs(model)
    on_target = lambda target: policy_costs(model, target)  # noqa: E731
    least, most = on_target("x86").bounds("latency")
    middle = 1e3 * (least + most) / 2
    budget = parse_budget(f"latency <= {middle}ms @ x86", costs, on_target)
    assert (budget.kind, budget.limit) == ("latency", pytest.approx(1e-3 * middle))
    assert budget.costs.table.target == "x86"
    assert parse_budget(f"latency<={1e3 * middle}us@x86", costs, on_target).limit == pytest.approx(
        budget.limit
    )
    highest = budget.costs.total(budget.costs.uniform(Mode(4, 4)), "latency")
    part = (least + most) / 2 / highest
    assert parse_budget(f"latency<={part}x@x86", costs, on_target).limit == pytest.approx(part * highest)
    for text, message in (
        ("latency<=2ms", "names its target"),
        ("bitops<=0.5x@x86", "no other budget does"),
        ("latency<=2kg@x86", "none of s, ms, us or x"),
        ("latency<=0.000001us@x86", r"below .* ms to .* ms"),
        ("latency<=2ms@toaster", "unknown target 'toaster'"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            parse_budget(text, costs, on_target)


@pytest.mark.slow
def test_a_search_holds_its_latency(model):
    _, x = trained("residual")
    batches = [(x, torch.arange(len(x)) % 3)]
    costs = policy_costs(model, "x86")
    least, most = costs.bounds("latency")
    limit = 1e3 * (least + 0.5 * (most - least))
    for method in ("greedy", "knapsack", "evolution"):
        policy = qcompile.search(model, batches, budget=f"latency<={limit}ms@x86", method=method)
        assert 1e3 * costs.total(policy, "latency") <= limit


def test_layers_take_less_than_the_whole(model):
    run = qcompile.lower(model, "x86", bits=4, threads=1)
    inputs = random_tensors(model.signature, run.request.input_shapes)
    found = run.layer_seconds(inputs, 5)
    assert {"conv1", "conv2", "down", "conv3"} <= found.keys()
    assert all(seconds >= 0 for seconds in found.values())
    assert qcompile.lower(model, "onnx-qdq", bits=4).layer_seconds(inputs, 5) is None


def test_a_table_asks_for_modes(model):
    with pytest.raises(InvalidArgument, match="unknown target"):
        latency_table(model, {"conv1": {MODES[0]: (MODES[0], 1)}}, "toaster")


# ---- memory ------------------------------------------------------------------------------------------------


def test_peak_bytes_of_a_chain_are_those_of_two_tensors():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 8, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 2, 3, padding=1),
    )
    x = torch.randn(3, 2, 6, 6)
    model = qcompile.prepare(net, x, scheme="coupled", bits=(2, 4))
    qcompile.calibrate(model, [x])
    for mode in (Mode(2, 2), Mode(4, 4), Mode(2, 4)):
        graph = model.eval().integer_model(mode)
        positions, a = 36, mode.activation_bits
        moments = (
            2 * 32 + 2 * 8,  # the input and its codes of 8 bits
            2 * 8 + 4 * a,  # around the first layer
            4 * a + 8 * 8,  # around the second, whose output the last layer reads at 8 bits
            8 * 8 + 2 * 32,  # sums become the output, in float
        )
        # the last layer's sums are stored: what reads them is no epilogue
        last = (8 * 8 + 2 * 32, 2 * 32 + 2 * 32)
        expected = max(*moments, *last) * positions // 8
        assert peak_activation_bytes(graph, [tuple(x.shape)], len(x)) == expected


def test_peak_bytes_count_what_waits_for_a_sum():
    model, x = trained("residual")
    low, high = (
        peak_activation_bytes(model.eval().integer_model(mode), [tuple(x.shape)], len(x))
        for mode in (Mode(2, 2), Mode(4, 4))
    )
    assert 0 < low <= high
