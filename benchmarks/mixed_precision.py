"""Mixed precision of a ResNet-20 on real images: training, search under budgets, accuracy against cost.

    python benchmarks/mixed_precision.py train model.pt                   weight coupling, pretrained at first
    python benchmarks/mixed_precision.py train plain.pt --plain           without schedule and distortion
    python benchmarks/mixed_precision.py search model.pt                  average 3 and 4 bits, three seeds
    python benchmarks/mixed_precision.py front model.pt --plot front.svg    accuracy against cost

With `--scheme vertical`, the same for vertical layering. Searches see training images only; accuracy is that
of the 1,017 exact test images. Images and weights are those of `examples/cifar10.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qcompile
from qcompile.modes import Mode
from qcompile.passes.schemes.coupled import CoupledConfig
from qcompile.policy_costs import policy_costs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import cifar10
from cifar10_resnet20 import DATA, accuracy
from resnet20 import processor

BITS = {"coupled": (2, 3, 4, 5, 6), "vertical": (2, 3, 4)}

#: Steps and learning rate.
TRAINING = {"coupled": (530, 0.008), "vertical": (1000, 0.02)}


def main() -> None:
    """Read the options and run one part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("train", "search", "front"))
    parser.add_argument("state", type=Path, help="state dict of the trained model")
    parser.add_argument("--scheme", choices=list(BITS), default="coupled")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the images and weights")
    parser.add_argument("--plain", action="store_true", help="train without schedule and distortion")
    parser.add_argument("--steps", type=int, help="default: the scheme's")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, help="learning rate; default: the scheme's")
    parser.add_argument("--seed", type=int, default=0, help="of training")
    parser.add_argument("--seeds", type=int, default=3, help="of the searches")
    parser.add_argument("--samples", type=int, default=96, help="training images that a search sees")
    parser.add_argument("--method", choices=("greedy", "knapsack", "evolution"), default="greedy")
    parser.add_argument("--start", choices=("highest", "nearest"), default="nearest", help="of greedy")
    parser.add_argument("--budgets", nargs="+", help="of the front; default: ten")
    parser.add_argument("--plot", type=Path, help="where to draw the front")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    steps, rate = TRAINING[options.scheme]
    options.steps, options.rate = options.steps or steps, options.rate or rate
    torch.set_num_threads(options.threads)
    {"train": train, "search": search, "front": front}[options.part](options)


def prepared(options: argparse.Namespace) -> nn.Module:
    """A ResNet-20 with the pretrained weights, for all bits."""
    images, _ = cifar10.exact(options.data, "train")
    off = CoupledConfig(schedule=False, distortion=0.0)
    return qcompile.prepare(
        cifar10.pretrained(options.data),
        images[:2],
        scheme=options.scheme,
        bits=BITS[options.scheme],
        config=off if options.plain else None,
    ).to(memory_format=torch.channels_last)


def trained(options: argparse.Namespace) -> nn.Module:
    """The model of `train`."""
    model = prepared(options)
    model.load_state_dict(torch.load(options.state))
    return model.eval()


def train(options: argparse.Namespace) -> None:
    """Train all bits at once and write the state dict."""
    torch.manual_seed(options.seed)
    images, labels = cifar10.exact(options.data, "train")
    model = prepared(options).train()
    groups = qcompile.param_groups(model, lr=options.rate, weight_decay=1e-4)
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    teacher = cifar10.pretrained(options.data).to(memory_format=torch.channels_last)
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss(), teacher=teacher, optimizer=optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    batches = cifar10.AugmentedBatches(images, labels, options.batch, options.seed)
    started, used = time.perf_counter(), time.process_time()
    for step in range(options.steps):
        joint.at_step(step, options.steps)
        x, y = batches.next()
        optimizer.zero_grad()
        joint.backward(x, y)
        nn.utils.clip_grad_value_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            losses = ", ".join(f"{label}: {float(loss):.3f}" for label, loss in joint.losses.items())
            print(f"step {step + 1}/{options.steps}, {losses}", file=sys.stderr)
    minutes = (time.perf_counter() - started) / 60, (time.process_time() - used) / 60
    torch.save(model.state_dict(), options.state)
    print(
        f"{options.steps} steps of {options.batch} images: {minutes[0]:.1f} minutes, {minutes[1]:.1f} of CPU"
    )


def calibration(options: argparse.Namespace, seed: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of training images."""
    images, labels = cifar10.exact(options.data, "train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]
    return [(images[part], labels[part]) for part in order.split(64)]


def measured(model: nn.Module, policy: qcompile.Policy, options: argparse.Namespace) -> float:
    """Accuracy on the test images; statistics of batch normalisation are those of 1,024 training images."""
    batches = [x for x, _ in calibration(options, 1000, 1024)]
    policy = qcompile.calibrate(model, batches, policy=policy)
    images, labels = cifar10.exact(options.data, "test")
    return accuracy(qcompile.at(model, policy), images, labels)


def search(options: argparse.Namespace) -> None:
    """Policies that cost what the uniform ones of 3 and 4 bits do, against these."""
    model = trained(options)
    costs = policy_costs(model)
    images, labels = cifar10.exact(options.data, "test")
    records: list[dict[str, Any]] = []
    rows = [
        "| average bits | G BitOPs | uniform | search, by seed | mean | not uniform | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for bits in (3, 4):
        uniform = costs.uniform(Mode(bits, bits))
        limit = costs.total(uniform, "bitops")
        base = measured(model, uniform, options)
        scores, minutes, mixed = [], [], 0
        for seed in range(options.seeds):
            started = time.perf_counter()
            policy = _searched(model, f"bitops<={limit}", seed, options)
            assert isinstance(policy, qcompile.Policy)
            minutes.append((time.perf_counter() - started) / 60)
            scores.append(measured(model, policy, options))
            mixed += len({mode for _, mode in policy.items}) > 1
            records.append(
                {"bits": bits, "seed": seed, "accuracy": scores[-1], "policy": dict(_bits(policy))}
            )
            print(json.dumps(records[-1]), file=sys.stderr)
        mean = sum(scores) / len(scores)
        listed = ", ".join(f"{one:.2f}" for one in scores)
        rows.append(
            f"| {bits} | {limit / 1e9:.3f} | {base:.2f} | {listed} | {mean:.2f} "
            f"| {mixed} of {options.seeds} | {max(minutes):.1f} |"
        )
    print(f"{processor()}, torch {torch.__version__}, {options.threads} threads, {options.samples} images")
    print(f"{options.method}, from the {options.start} uniform policy")
    print(f"float: {accuracy(cifar10.pretrained(options.data), images, labels):.2f}")
    print("\n".join(rows))


def _searched(
    model: nn.Module, budget: str | list[str], seed: int, options: argparse.Namespace
) -> qcompile.Policy | list[qcompile.Policy]:
    """Other training images than those of the rounds choose between what was found and uniform modes."""
    batches, held_out = calibration(options, seed, options.samples), calibration(options, 2000 + seed, 1024)
    return qcompile.search(
        model, batches, budget, options.method, start=options.start, held_out=held_out, seed=seed
    )


def _bits(policy: qcompile.Policy) -> list[tuple[str, str]]:
    return [(name, f"w{mode.weight_bits}a{mode.activation_bits}") for name, mode in policy.items]


def front(options: argparse.Namespace) -> None:
    """Accuracy of searched and of uniform policies against what they cost."""
    model = trained(options)
    costs = policy_costs(model)
    kind = "size" if options.scheme == "vertical" else "bitops"
    least, most = costs.bounds(kind)
    budgets = options.budgets or [
        f"{kind}<={int(least + (most - least) * part / 9)}{'B' if kind == 'size' else ''}"
        for part in range(10)
    ]
    policies = _searched(model, budgets, 0, options)
    assert isinstance(policies, list)
    uniform = [costs.uniform(Mode(bits, bits)) for bits in BITS[options.scheme]]
    points = {
        name: [(costs.total(one, kind), measured(model, one, options)) for one in given]
        for name, given in (("search", policies), ("uniform", uniform))
    }
    print(f"| policy | {kind} | accuracy |\n|---|---|---|")
    for name, given in points.items():
        for cost, score in given:
            print(f"| {name} | {cost:,} | {score:.2f} |")
    if options.plot:
        _draw(points, kind, options.plot)


def _draw(points: dict[str, list[tuple[int, float]]], kind: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for (name, given), marker in zip(points.items(), "os", strict=True):
        scale = 1e3 if kind == "size" else 1e9
        axes.plot(
            [cost / scale for cost, _ in given], [score for _, score in given], marker=marker, label=name
        )
    axes.set_xlabel("KB of weights" if kind == "size" else "G BitOPs per image")
    axes.set_ylabel("test images right, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
