"""Search: greedy against a step-by-step reference, losses against whole runs, budgets held."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from nets import trained
from torch import nn

import qcompile
from qcompile.errors import FileFormatError, InvalidArgument, InvalidInputType
from qcompile.modes import Mode
from qcompile.policy import Policy
from qcompile.policy_costs import PolicyCosts, SearchedLayer, policy_costs
from qcompile.search import _best
from qcompile.search.budget import parse_budget
from qcompile.search.evaluation import Evaluator
from qcompile.search.greedy import greedy, minmax, starting_policy

torch.set_num_threads(1)

UNIFORM = tuple(Mode(b, b) for b in (2, 3, 4))
GRID = tuple(Mode(w, a) for w in (2, 3, 4) for a in (2, 3, 4))
MACS = {"a": 10, "b": 30, "c": 5}


def _toy(modes):
    return tuple(SearchedLayer(name, macs, macs, True, (name,), modes) for name, macs in MACS.items())


def _toy_loss(bits):
    """Hand-made: w and a by layer to a loss; c matters most, b hardly."""
    harm = {"a": 1.0, "b": 0.2, "c": 4.0}
    return sum(harm[name] * (4.0**-w + 0.5 * 3.0**-a) for name, (w, a) in bits.items())


def _losses(current, candidates):
    return [_toy_loss({n: (m.weight_bits, m.activation_bits) for n, m in one.items}) for one in candidates]


def _reference(kinds_of_phase, limit, trade, on_loss):
    """Eq. 9 step by step over {layer: [w, a]}; `kinds_of_phase` gives the indices that may change."""
    state = dict.fromkeys(MACS, (4, 4))
    seen, path = [state], []

    def cost(one):
        return sum(w * a * MACS[name] for name, (w, a) in one.items())

    while cost(state) > limit:
        found = []
        for name in sorted(MACS):
            for places in kinds_of_phase(cost(state)):
                for step in (1, -1):
                    pair = list(state[name])
                    for place in places:
                        pair[place] += step
                    other = {**state, name: tuple(pair)}
                    if min(pair) >= 2 and max(pair) <= 4 and other not in seen:
                        found.append(other)
        losses, costs = (
            np.array([_toy_loss(one) for one in found]),
            np.array([float(cost(one)) for one in found]),
        )

        def scaled(values):
            span = values.max() - values.min()
            return (values - values.min()) / span if span else np.zeros_like(values)

        score = trade * scaled(losses) + scaled(costs) if on_loss else scaled(losses) + trade * scaled(costs)
        state = found[int(np.argmin(score))]
        seen.append(state)
        path.append(state)
    return path


@pytest.mark.parametrize("limit", [600, 450, 300, 200])
@pytest.mark.parametrize("trade", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("on_loss", [False, True])
@pytest.mark.parametrize("kind", ["tied", "both", "weights first"])
def test_greedy_is_the_papers_step_by_step(limit, trade, on_loss, kind):
    halfway = np.sqrt(720.0 * limit)
    phases = {
        "tied": lambda cost: [(0, 1)],
        "both": lambda cost: [(0,), (1,)],
        "weights first": lambda cost: [(0,)] if cost > halfway else [(1,)],
    }
    modes = UNIFORM if kind == "tied" else GRID
    costs = PolicyCosts(modes, _toy(modes))
    path = []
    budget = parse_budget(f"bitops<={limit}", costs)
    first = kind != "both"
    found = greedy(costs, _losses, budget, trade, on_loss, first, lambda *told: path.append(told[0]))
    expected = _reference(phases[kind], limit, trade, on_loss)
    given = [{n: (m.weight_bits, m.activation_bits) for n, m in one.items} for one in path]
    assert given == expected
    assert found == path[-1]


def test_the_smallest_policy_is_found_without_detours():
    # bits of one kind at their lowest would else go up and down until all policies were seen
    macs = {f"layer{i}": 2_359_296 for i in range(18)}
    costs = PolicyCosts(
        GRID, tuple(SearchedLayer(name, one, one, True, (name,), GRID) for name, one in macs.items())
    )
    budget = parse_budget(f"bitops<={4 * sum(macs.values())}", costs)
    rounds = []

    def losses(current, candidates):
        rounds.append(current)
        assert len(rounds) <= 4 * len(macs)
        return [-float(costs.total(one, "bitops")) for one in candidates]

    assert greedy(costs, losses, budget) == costs.uniform(GRID[0])
    for mode in (Mode(2, 4), Mode(4, 2), Mode(3, 3)):
        rounds.clear()
        assert greedy(costs, losses, budget, start=costs.uniform(mode)) == costs.uniform(GRID[0])


def test_minmax_of_equal_values_is_zero():
    assert minmax([3.0, 3.0]) == [0.0, 0.0]
    assert minmax([1.0, 3.0, 2.0]) == [0.0, 1.0, 0.5]


def _batches(x, count=2):
    labels = torch.arange(len(x)) % 3
    return [(one, target) for one, target in zip(x.chunk(count), labels.chunk(count), strict=True)]


def _random_policy(costs, seed):
    chosen = random.Random(seed)
    return Policy({one.name: chosen.choice(costs.modes) for one in costs.layers})


@pytest.mark.parametrize("name", ["residual", "mobile", "dense"])
def test_losses_are_those_of_whole_runs(name):
    model, x = trained(name)
    model.train()
    criterion, batches = nn.CrossEntropyLoss(), _batches(x)
    costs = policy_costs(model)
    evaluator = Evaluator(model, batches, criterion)
    policies = [_random_policy(costs, seed) for seed in range(6)]
    found = evaluator.losses(policies[0], policies)
    assert model.training
    model.eval()
    for policy, loss in zip(policies, found, strict=True):
        with torch.inference_mode():
            sums = [
                float(
                    criterion(
                        model.signature.restore(model.float_chain(model.rows_of(policy), [one])), target
                    )
                )
                * len(one)
                for one, target in batches
            ]
        # batch normalisation is one multiplication and addition here
        assert loss == pytest.approx(sum(sums) / len(x), rel=1e-6)
    other = Evaluator(model.train(), batches, criterion)
    assert other.losses(policies[3], policies[::-1]) == found[::-1]  # whatever the base is


@pytest.mark.parametrize("method", ["greedy", "knapsack", "evolution"])
def test_policies_hold_their_budgets(method):
    model, x = trained("residual")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    costs = policy_costs(model)
    budgets = ["bitops<=0.9x", "bitops<=0.7x", "size<=0.8x"]
    found = qcompile.search(model, _batches(x), budgets, method)
    for policy, text in zip(found, budgets, strict=True):
        budget = parse_budget(text, costs)
        assert costs.total(policy, budget.kind) <= budget.limit
        assert policy.statistics
        report = qcompile.verify(model, x, bits=policy)
        assert report.exact, report.failures
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    again = qcompile.search(model, _batches(x), budgets[1], method)
    assert again == found[1]


def test_dicts_and_several_inputs():
    model, x = trained("residual")
    name = model.signature.parameters[0].name
    plain = qcompile.search(model, _batches(x), "bitops<=0.7x")
    as_dicts = [({name: one}, target) for one, target in _batches(x)]
    as_tuples = [((one,), target) for one, target in _batches(x)]
    assert qcompile.search(model, as_dicts, "bitops<=0.7x") == plain
    assert qcompile.search(model, as_tuples, "bitops<=0.7x") == plain


def test_bad_input_is_one_line():
    model, x = trained("residual")
    batches = _batches(x)
    with pytest.raises(InvalidArgument, match="'anneal' is none of greedy, knapsack, evolution"):
        qcompile.search(model, batches, "bitops<=0.7x", "anneal")
    with pytest.raises(InvalidArgument, match="trade_on"):
        qcompile.search(model, batches, "bitops<=0.7x", trade_on="size")
    with pytest.raises(InvalidArgument, match="trade=-1"):
        qcompile.search(model, batches, "bitops<=0.7x", trade=-1)
    with pytest.raises(InvalidArgument, match="loader was empty"):
        qcompile.search(model, [], "bitops<=0.7x")
    with pytest.raises(InvalidInputType, match="batches"):
        qcompile.search(model, [x], "bitops<=0.7x")
    with pytest.raises(InvalidInputType, match="iterable"):
        qcompile.search(model, 3, "bitops<=0.7x")
    with pytest.raises(InvalidArgument, match=r"the loss of policy .* is nan"):
        qcompile.search(model, [(x * torch.nan, batches[0][1].repeat(2))], "bitops<=0.7x")
    with pytest.raises(InvalidArgument, match="below that of the smallest"):
        qcompile.search(model, batches, "bitops<=1")
    with pytest.raises(InvalidArgument, match="above that of the largest"):
        qcompile.search(model, batches, "bitops<=1.5x")


def _search_setup():
    model, x = trained("residual")
    return model, _batches(x)


def test_a_stopped_search_goes_on(tmp_path, monkeypatch):
    model, batches = _search_setup()
    path = tmp_path / "losses.json"
    expected = qcompile.search(model, batches, budget="bitops<=0.6x")
    computed = []
    original = Evaluator._mean_losses

    def stopping(self, base, candidates):
        computed.extend(candidates)
        if len(computed) > 12:
            raise KeyboardInterrupt
        return original(self, base, candidates)

    monkeypatch.setattr(Evaluator, "_mean_losses", stopping)
    with pytest.raises(KeyboardInterrupt):
        qcompile.search(model, batches, budget="bitops<=0.6x", checkpoint=path)
    seen, again = set(computed[:-1]), []

    def counting(self, base, candidates):
        again.extend(candidates)
        return original(self, base, candidates)

    monkeypatch.setattr(Evaluator, "_mean_losses", counting)
    found = qcompile.search(model, batches, budget="bitops<=0.6x", checkpoint=path)
    assert found == expected
    assert len(json.loads(path.read_text())["losses"]) > 0
    before = {one for one in computed if one not in again}
    assert before
    assert before <= seen
    again.clear()
    assert qcompile.search(model, batches, budget="bitops<=0.6x", checkpoint=path) == expected
    assert not again


def test_a_checkpoint_of_another_search_is_refused(tmp_path):
    model, batches = _search_setup()
    path = tmp_path / "losses.json"
    qcompile.search(model, batches, budget="bitops<=0.8x", checkpoint=path)
    for other in (
        {"loader": [(one + 1, target) for one, target in batches]},
        {"statistics": "running"},
        {"criterion": lambda output, target: output.square().mean()},
    ):
        given = {"loader": batches, **other}
        with pytest.raises(InvalidArgument, match="another model, other batches or other options"):
            qcompile.search(model, budget="bitops<=0.8x", checkpoint=path, **given)
    content = json.loads(path.read_text())
    for spoilt in ("", "[]", '{"format": "x"}', json.dumps({**content, "version": 9})):
        path.write_text(spoilt)
        with pytest.raises(FileFormatError, match=r"losses\.json: no file of a search"):
            qcompile.search(model, batches, budget="bitops<=0.8x", checkpoint=path)
    path.write_text(json.dumps({**content, "losses": [[["w2a2"], 1.0]]}))
    with pytest.raises(FileFormatError, match="malformed"):
        qcompile.search(model, batches, budget="bitops<=0.8x", checkpoint=path)


@pytest.mark.parametrize("name", ["residual", "mobile"])
def test_losses_by_batch_are_those_of_training_mode(name):
    model, x = trained(name)
    criterion, batches = nn.CrossEntropyLoss(), _batches(x)
    costs = policy_costs(model)
    policies = [_random_policy(costs, seed) for seed in range(4)]
    found = Evaluator(model, batches, criterion, by_batch=True).losses(policies[0], policies)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    for policy, loss in zip(policies, found, strict=True):
        with torch.no_grad():
            sums = [
                float(criterion(qcompile.at(model, policy)(one), target)) * len(one)
                for one, target in batches
            ]
        assert loss == pytest.approx(sum(sums) / len(x), rel=1e-4)
    model.load_state_dict(before)


@pytest.mark.parametrize("method", ["greedy", "evolution"])
def test_held_out_batches_choose_between_what_was_found_and_uniform_modes(method):
    model, batches = _search_setup()
    costs = policy_costs(model)
    uniform = [costs.uniform(mode) for mode in costs.modes]
    budgets = ["bitops<=0.9x", "bitops<=0.7x", "bitops<=0.55x"]
    held_out = [(one + 0.1, target.roll(1)) for one, target in batches]  # other policies are the best there
    found = qcompile.search(model, batches, budgets, method, held_out=held_out)
    evaluators = [Evaluator(model, [one], nn.CrossEntropyLoss(), by_batch=True) for one in held_out]
    for policy, text in zip(found, budgets, strict=True):
        limit = parse_budget(text, costs).limit
        within = [one for one in uniform if costs.total(one, "bitops") <= limit]
        losses = np.array([one.losses(uniform[0], [Policy(policy.layers), *within]) for one in evaluators])
        best = 1 + int(losses[:, 1:].mean(0).argmin())
        gains = losses[:, best] - losses[:, 0]
        clearly = gains.mean() > gains.std(ddof=1) / np.sqrt(len(gains))
        assert Policy(policy.layers) in within if not clearly else Policy(policy.layers) not in within
        others = [Policy(one.layers) for one in found if costs.total(one, "bitops") <= limit]
        means = np.array([one.losses(uniform[0], others) for one in evaluators]).mean(0)
        assert losses[:, 0].mean() <= means.min()


@pytest.mark.parametrize(
    ("gains", "wins"), [([0.1, 0.2, 0.3], True), ([-0.5, 0.2, 0.4], False), ([0.0], False)]
)
def test_what_is_not_clearly_better_than_a_uniform_mode_is_not_chosen(gains, wins):
    costs = PolicyCosts(GRID, _toy(GRID))
    found = Policy({"a": Mode(2, 3), "b": Mode(3, 3), "c": Mode(3, 3)})

    class Batch:
        def __init__(self, gain):
            self.gain = gain

        def losses(self, base, candidates):
            return [
                {found: 1.0 - self.gain, costs.uniform(Mode(3, 3)): 1.0}.get(one, 2.0) for one in candidates
            ]

    (chosen,) = _best([found], [parse_budget("bitops<=405", costs)], [Batch(one) for one in gains])
    assert chosen == (found if wins else costs.uniform(Mode(3, 3)))


def test_the_last_quarter_is_held_out():
    model, x = trained("residual")
    batches = _batches(x, 4)
    expected = qcompile.search(model, batches[:3], "bitops<=0.7x", held_out=batches[3:])
    assert qcompile.search(model, batches, "bitops<=0.7x") == expected
    assert qcompile.search(model, batches, "bitops<=0.7x", held_out=batches) != expected  # other statistics


@pytest.mark.parametrize(("limit", "expected"), [(300, "w3a3"), (405, "w3a4"), (600, "w4a4")])
def test_the_nearest_start_is_worth_its_cost(limit, expected):
    # w2a4, w4a2 and w4a3 have more loss than w3a2 and w3a4, which cost no more
    loss = {
        "w2a2": 9,
        "w2a3": 8,
        "w3a2": 7,
        "w2a4": 7.2,
        "w4a2": 7.5,
        "w3a3": 4,
        "w3a4": 2,
        "w4a3": 3,
        "w4a4": 1,
    }
    costs = PolicyCosts(GRID, _toy(GRID))

    def losses(base, candidates):
        return [float(loss[dict(one.items)["a"].name]) for one in candidates]

    budget = parse_budget(f"bitops<={limit}", costs)
    assert starting_policy(costs, losses, budget, "nearest") == costs.uniform(Mode.parse(expected))
    assert starting_policy(costs, losses, budget, "highest") == costs.uniform(GRID[-1])
