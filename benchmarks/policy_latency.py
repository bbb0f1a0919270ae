"""Latencies of policies as budgets count them, against those of the lowered models, on a ResNet-18.

    python benchmarks/policy_latency.py

Weights are random: times do not depend on them. A policy is chosen at random for its budget, then lowered and
timed, the fastest of many runs.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings

import torch
from networks import ResNet18
from resnet20 import processor

import qcompile
from qcompile.policy_costs import policy_costs
from qcompile.search.budget import parse_budget
from qcompile.search.evolution import evolve
from qcompile.timing import best_of


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="x86")
    parser.add_argument("--scheme", default="vertical")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 6, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--runs", type=int, default=40)
    options = parser.parse_args()
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message=".*no batch normalisation statistics.*")
    x = torch.randn(2, 3, options.size, options.size)
    model = qcompile.prepare(ResNet18(), x, scheme=options.scheme, bits=options.bits).train()
    with torch.no_grad():
        for mode in qcompile.modes(model):
            qcompile.at(model, mode)(x)
    model.eval()
    started = time.perf_counter()
    costs = policy_costs(model, options.target, threads=options.threads)
    seconds = time.perf_counter() - started
    least, most = costs.bounds("latency")
    print(f"{processor()}, torch {torch.__version__}, {options.threads} threads")
    print(f"table measured in {seconds:.0f} s; policies take {1e3 * least:.2f} to {1e3 * most:.2f} ms")
    print("| budget, ms | estimate, ms | measured, ms | measured / budget |\n|---|---|---|---|")
    for part in (0.1, 0.3, 0.5, 0.7, 0.9):
        limit = least + part * (most - least)
        budget = parse_budget(f"latency<={1e3 * limit}ms@{options.target}", costs, lambda _: costs)
        chance = random.Random(part)
        policy = evolve(costs, lambda _, found, c=chance: [c.random() for _ in found], budget, 0)
        run = qcompile.lower(model, options.target, bits=policy, threads=options.threads)
        with torch.no_grad():
            found = best_of(options.runs, {"run": lambda r=run: r(x[:1])})["run"]
        estimate = costs.total(policy, "latency")
        print(f"| {1e3 * limit:.2f} | {1e3 * estimate:.2f} | {1e3 * found:.2f} | {found / limit:.2f} |")


if __name__ == "__main__":
    main()
