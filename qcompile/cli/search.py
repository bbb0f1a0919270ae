"""`qcompile search`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibrate import calibrate
from ..errors import InvalidArgument
from ..file.save import save
from ..model import QuantModel
from ..policy import Policy
from ..policy_costs import policy_costs
from ..prepare import prepare
from ..search import search
from ..search.evaluation import Evaluator
from .data import Inputs, read_labelled
from .factory import build, load_weights, parameters_of, read_weights, width
from .figure import check_plot, new_figure
from .tables import print_json, print_table


def search_command(
    factory: str,
    weights: Path,
    scheme: str,
    bits: str | None,
    modes: str | None,
    skip: list[str],
    data: Path,
    budgets: list[str],
    method: str,
    start: str,
    samples: int,
    batch: int,
    seed: int,
    checkpoint: Path | None,
    output: Path,
    plot: Path | None,
    file: Path | None,
    as_json: bool,
) -> None:
    """Search a policy for every budget; write them, and if asked for a plot and a file that holds them."""
    for name, value in (("--samples", samples), ("--batch", batch)):
        if value < 1:
            raise InvalidArgument(f"{name} must be at least 1, not {value}")
    if not budgets:
        raise InvalidArgument("name a budget, for example --budget 'bitops<=0.5x'")
    check_plot(plot)
    float_model = build(factory).eval()
    inputs, labels = read_labelled(data, parameters_of(float_model), ())
    chosen = torch.linspace(0, len(labels) - 1, min(samples, len(labels))).long()
    inputs = Inputs({name: value[chosen] for name, value in inputs.values.items()}, inputs.shared)
    labels = labels[chosen]
    firsts = range(0, len(labels), batch)
    state = read_weights(weights)
    is_trained = not state.keys() <= float_model.state_dict().keys()
    if not is_trained:
        load_weights(float_model, weights, state)
    widths = None if bits is None else [width(one) for one in bits.split(",")]
    names = None if modes is None else modes.split(",")
    model = prepare(float_model, inputs.part(0, 2), scheme=scheme, bits=widths, modes=names, skip=skip)
    assert isinstance(model, QuantModel)
    if is_trained:
        load_weights(model, weights, state)
    else:
        calibrate(model, [inputs.part(first, first + batch) for first in firsts], progress=True)
    batches = [(inputs.part(first, first + batch), labels[first : first + batch]) for first in firsts]
    how: dict[str, Any] = {"method": method, "start": start}  # which `search` checks
    found = search(model, batches, budgets, **how, seed=seed, checkpoint=checkpoint, progress=True)
    assert isinstance(found, list)
    paths = [output] if len(found) == 1 else _numbered(output, len(found))
    costs = policy_costs(model)
    rows: list[dict[str, Any]] = []
    for budget, policy, path in zip(budgets, found, paths, strict=True):
        policy.save(path)
        spent = {"BitOPs": costs.total(policy, "bitops"), "bytes of weights": costs.total(policy, "size")}
        bits_used = policy.label.removeprefix("policy ")
        rows.append({"budget": budget, "layers": bits_used, **spent, "file": str(path)})
    if plot is not None:
        _draw(found, _points(model, batches, found, budgets[0]), plot)
    if file is not None:
        save(model.eval(), file, modes=found)
    print_json(rows) if as_json else print_table("Policies", rows)


def _numbered(path: Path, count: int) -> list[Path]:
    return [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, count + 1)]


def _points(
    model: QuantModel, batches: list[Any], found: list[Policy], budget: str
) -> dict[str, list[tuple[float, float]]]:
    """Cost, in what the first budget limits, and loss: of the policies, and of uniform modes."""
    costs = policy_costs(model)
    kind = "size" if budget.strip().startswith("size") else "bitops"
    uniform = [costs.uniform(mode) for mode in costs.modes if mode.weight_bits == mode.activation_bits]
    losses = Evaluator(model, batches, nn.CrossEntropyLoss(), by_batch=True)
    return {
        f"{name}, {kind}": list(
            zip([costs.total(one, kind) for one in given], losses.losses(given[0], given), strict=True)
        )
        for name, given in (("searched", found), ("uniform", uniform))
        if given
    }


def _draw(policies: list[Policy], points: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Weight and activation bits of every layer, a column for each policy; loss against cost."""
    layers = [name for name, _ in policies[0].items]
    figure = new_figure(8 + len(policies), 1.5 + 0.25 * len(layers))
    for place, kind in enumerate(("weight", "activation")):
        axes = figure.add_subplot(1, 3, place + 1)
        bits = [[getattr(one.layers[name], f"{kind}_bits") for one in policies] for name in layers]
        axes.imshow(bits, aspect="auto", cmap="viridis")
        for row, values in enumerate(bits):
            for column, value in enumerate(values):
                axes.text(column, row, str(value), ha="center", va="center", color="white", fontsize=8)
        axes.set_yticks(range(len(layers)), layers if place == 0 else [""] * len(layers), fontsize=7)
        axes.set_xticks(range(len(policies)), [str(one + 1) for one in range(len(policies))])
        axes.set_title(f"{kind} bits")
        axes.set_xlabel("policy")
    axes = figure.add_subplot(1, 3, 3)
    for name, given in points.items():
        axes.plot(*zip(*sorted(given), strict=True), marker="o", label=name)
    axes.set_title("loss against cost")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
