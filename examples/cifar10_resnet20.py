"""Train one ResNet-20 for several bit-widths on real CIFAR-10 images, from pretrained float weights.

    python examples/cifar10_resnet20.py                    the short recipe, 12 minutes on two cores
    python examples/cifar10_resnet20.py --long             three times as many steps
    python examples/cifar10_resnet20.py --single-bit       a quarter of the budget, against a model per width
    python examples/cifar10_resnet20.py --ablations        a quarter of the budget, one part left out each
    python examples/cifar10_resnet20.py --scheme n2uq      another scheme; with all of the above
    python examples/cifar10_resnet20.py --scheme all       all schemes side by side

`--single-bit --ablations` together share the runs of the default recipe.

The two changed lines of an ordinary training loop are `qcompile.prepare` and `joint.backward`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cifar10
import torch
from cifar10_tables import print_comparison, print_schemes
from torch import Tensor, nn

import qcompile
from qcompile.passes.schemes.multibranch import MultiBranchConfig
from qcompile.passes.schemes.n2uq import N2UQConfig
from qcompile.passes.schemes.quantizable import QuantizableConfig
from qcompile.passes.schemes.vertical import VerticalConfig

DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"

#: Modes of each scheme.
BITS: dict[str, tuple[int, ...]] = {
    "vertical": (2, 3, 4),
    "quantizable": (2, 3, 4, 32),
    "n2uq": (2, 3, 4),
    "multibranch": (2, 4, 6, 8),
}

#: Optimiser steps that take about 12 minutes on two cores; of n2uq, a model per width.
STEPS = {"vertical": 1000, "quantizable": 700, "n2uq": 1000, "multibranch": 600}

#: Images in a step. Ten branches run in each of multibranch's, and smaller ones get further in the same time.
BATCHES = {"vertical": 64, "quantizable": 64, "n2uq": 64, "multibranch": 32}

#: Schemes whose modes are networks of their own, each of which is trained alone.
APART = ("n2uq",)

# training starts from a float network, so ranges come from data or narrow ones, and RPReLU starts as ReLU
_QUANTIZABLE = QuantizableConfig(activation_range="data", weight_deviations=2.5)
_N2UQ = N2UQConfig(rprelu_slope=0.0, activation_scale="data")
_MULTIBRANCH = MultiBranchConfig(weight_deviations=2.0)

#: Configs by scheme: the default of this script, and what the ablations leave out or exchange.
VARIANTS: dict[str, dict[str, Any]] = {
    "vertical": {
        "default": VerticalConfig(),
        "no compensation": VerticalConfig(compensation=False),
        "BatchNorm stats": VerticalConfig(batch_norm="stats"),
        "BatchNorm shared": VerticalConfig(batch_norm="shared"),
        "no self-distillation": VerticalConfig(distillation=None),
        "MGD": VerticalConfig(moo="mgd"),
    },
    "quantizable": {
        "default": _QUANTIZABLE,
        "task loss": replace(_QUANTIZABLE, loss="task"),
        "BatchNorm A": replace(_QUANTIZABLE, batch_norm="A"),
        "BatchNorm shared": replace(_QUANTIZABLE, batch_norm="shared"),
    },
    "n2uq": {
        "default": _N2UQ,
        "fixed thresholds": replace(_N2UQ, learned_thresholds=False),
        "no weight rescaling": replace(_N2UQ, rescale_weights=False),
    },
    "multibranch": {
        "default": _MULTIBRANCH,
        "serial": replace(_MULTIBRANCH, selection="serial"),
        "no distillation": replace(_MULTIBRANCH, distillation=False),
    },
}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run."""

    steps: int = 1000
    batch: int = 64
    learning_rate: float = 0.02
    weight_decay: float = 1e-4
    seed: int = 0
    scheme: str = "vertical"
    bits: tuple[int, ...] = BITS["vertical"]
    variant: str = "default"
    teacher: bool = True
    autocast: bool = False
    compiled: bool = False


def train(recipe: Recipe, data: Path) -> tuple[nn.Module, float]:
    """The trained model and the seconds that training took."""
    torch.manual_seed(recipe.seed)
    images, labels = cifar10.exact(data, "train")
    teacher = cifar10.pretrained(data).to(memory_format=torch.channels_last)
    model = qcompile.prepare(
        cifar10.pretrained(data),
        images[:2],
        scheme=recipe.scheme,
        bits=recipe.bits,
        config=VARIANTS[recipe.scheme][recipe.variant],
    )
    model = model.to(memory_format=torch.channels_last).train()
    called = torch.compile(model) if recipe.compiled else model
    joint = qcompile.JointLoss(called, nn.CrossEntropyLoss(), teacher=teacher if recipe.teacher else None)
    groups = qcompile.param_groups(model, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    batches = cifar10.AugmentedBatches(images, labels, recipe.batch, recipe.seed)
    started = time.perf_counter()
    for step in range(recipe.steps):
        x, y = batches.next()
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.autocast):
            joint.backward(x, y)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            losses = ", ".join(f"{label}: {float(loss):.3f}" for label, loss in joint.losses.items())
            print(
                f"step {step + 1}/{recipe.steps}, {time.perf_counter() - started:.0f} s, {losses}",
                file=sys.stderr,
            )
    return model.eval(), time.perf_counter() - started


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, chunk: int = 128) -> float:
    """Top-1 in percent."""
    correct = 0
    with torch.no_grad():
        for start in range(0, len(labels), chunk):
            outputs = model(images[start : start + chunk])
            correct += int((outputs.argmax(1) == labels[start : start + chunk]).sum())
    return 100.0 * correct / len(labels)


def lowered_accuracy(model: nn.Module, bits: int, images: Tensor, labels: Tensor, chunk: int = 128) -> float:
    """Top-1 in percent of the model lowered to ONNX, run by ONNX Runtime."""
    executable = qcompile.lower(model, target="onnx-qdq", bits=bits, batch=chunk)
    padding = -len(labels) % chunk
    padded = torch.cat([images, images[:padding]])
    outputs = torch.cat([executable(padded[start : start + chunk]) for start in range(0, len(padded), chunk)])
    return 100.0 * float((outputs[: len(labels)].argmax(1) == labels).float().mean())


def run_one(recipe: Recipe, data: Path, jpeg: bool) -> dict[str, object]:
    """Train, score every width on the exact test images (and the JPEG ones), return a record."""
    model, seconds = train(recipe, data)
    scores: dict[str, dict[int, float]] = {"exact": {}, "jpeg": {}}
    images, labels = cifar10.exact(data, "test")
    for bits in recipe.bits:
        scores["exact"][bits] = accuracy(qcompile.at(model, bits), images, labels)
    if jpeg:
        more, targets = cifar10.jpeg_test(data)
        for bits in recipe.bits:
            scores["jpeg"][bits] = lowered_accuracy(model, bits, more, targets)
    return {"recipe": {**recipe.__dict__}, "seconds": round(seconds), **scores}


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the images and weights")
    parser.add_argument("--steps", type=int, help="optimiser steps; default: those of 12 minutes")
    parser.add_argument("--bits", type=int, nargs="+", help="widths to prepare instead of the scheme's own")
    parser.add_argument("--scheme", choices=[*BITS, "all"], default="vertical")
    parser.add_argument("--long", action="store_true", help="three times as many steps")
    parser.add_argument("--single-bit", action="store_true", help="compare with single-bit models")
    parser.add_argument("--loops", action="store_true", help="compare with bf16 autocast and torch.compile")
    parser.add_argument("--ablations", action="store_true", help="compare the variants of the scheme")
    parser.add_argument("--compile", action="store_true", help="train with torch.compile (a C++ compiler)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the comparisons")
    parser.add_argument(
        "--jobs", type=int, default=2, help="runs at a time in the comparisons, one thread each"
    )
    parser.add_argument("--save", type=Path, help="write the trained model to this .qcm file")
    parser.add_argument(
        "--log", type=Path, help="append one JSON record per run to this file; comparisons go on from it"
    )
    parser.add_argument("--one-run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.data / "cifar10_exact" / "labels.npz").exists():
        parser.error(f"no CIFAR-10 data in {options.data}; pass --data FOLDER")
    if options.scheme == "all" and (options.single_bit or options.loops or options.ablations):
        parser.error("comparisons are of one scheme: name it with --scheme")
    schemes = list(BITS) if options.scheme == "all" else [options.scheme]
    bases = [recipe_of(scheme, options) for scheme in schemes]
    base = bases[0]
    if options.one_run:
        torch.set_num_threads(1)
        fields = json.loads(options.one_run)
        print(
            json.dumps(run_one(Recipe(**{**fields, "bits": tuple(fields["bits"])}), options.data, jpeg=True))
        )
    elif len(schemes) > 1:
        records = run_many([run for one in bases for run in models_of(one)], options)
        images, labels = cifar10.exact(options.data, "test")
        print_schemes(records, accuracy(cifar10.pretrained(options.data), images, labels))
    elif options.ablations or options.single_bit or options.loops:
        quarter = replace(base, steps=options.steps or base.steps // 4)
        changes: list[dict] = [{}]  # from the default
        if options.single_bit:
            changes += [{"bits": (bits,)} for bits in base.bits if bits != 32]
        if options.loops:
            changes += [{"autocast": True}, {"compiled": True}]
        if options.ablations:
            changes += [{"variant": name} for name in VARIANTS[base.scheme] if name != "default"]
        runs = [
            run
            for change in changes
            for seed in range(options.seeds)
            for run in models_of(replace(quarter, seed=seed, **change))
        ]
        print_comparison(run_many(runs, options), APART)
    else:
        print_main_table(base, options)


def recipe_of(scheme: str, options: argparse.Namespace) -> Recipe:
    """The scheme's recipe with what the options change."""
    steps = options.steps or STEPS[scheme] * (3 if options.long else 1)
    bits = tuple(options.bits or BITS[scheme])
    return Recipe(steps, BATCHES[scheme], scheme=scheme, bits=bits, compiled=options.compile)


def models_of(recipe: Recipe) -> list[Recipe]:
    """One recipe for each model that is trained."""
    if recipe.scheme not in APART:
        return [recipe]
    return [replace(recipe, bits=(bits,)) for bits in recipe.bits]


def print_main_table(base: Recipe, options: argparse.Namespace) -> None:
    """The result of one recipe: float and every width, in PyTorch and in ONNX Runtime."""
    images, labels = cifar10.exact(options.data, "test")
    float_accuracy = accuracy(cifar10.pretrained(options.data), images, labels)
    rows = []
    for recipe in models_of(base):
        model, seconds = train(recipe, options.data)
        widths = ", ".join(map(str, recipe.bits))
        print(f"{widths} bits: {recipe.steps} steps in {seconds / 60:.1f} minutes, torch {torch.__version__}")
        record = {"recipe": {**recipe.__dict__}, "seconds": round(seconds), "float": float_accuracy}
        for bits in recipe.bits:
            scored = accuracy(qcompile.at(model, bits), images, labels)
            lowered = lowered_accuracy(model, bits, images, labels)
            rows.append(f"| {bits} bits | {scored:.2f} | {scored - float_accuracy:+.2f} | {lowered:.2f} |")
            record[str(bits)] = scored
        if options.save:
            apart = f"{options.save.stem}-{recipe.bits[0]}{options.save.suffix}"
            qcompile.save(model, options.save.with_name(apart) if base.scheme in APART else options.save)
        write_log(options, record)
    print("| mode | exact test images | against float | ONNX Runtime |\n|---|---|---|---|")
    print(f"| float | {float_accuracy:.2f} | | |")
    print("\n".join(reversed(rows)))


def run_many(runs: list[Recipe], options: argparse.Namespace) -> list[dict]:
    """Run recipes in processes of one thread each, several at a time; those in the log are not run again."""
    command = [sys.executable, __file__, "--data", str(options.data), "--one-run"]
    logged = {json.dumps(one["recipe"]): one for one in read_log(options) if "exact" in one}
    keys = [json.dumps(run.__dict__) for run in runs]
    records = [logged[key] for key in keys if key in logged]
    waiting = [run for run, key in zip(runs, keys, strict=True) if key not in logged]
    active: list[subprocess.Popen[bytes]] = []
    while waiting or active:
        while waiting and len(active) < options.jobs:
            job = json.dumps(waiting.pop(0).__dict__)
            active.append(
                subprocess.Popen([*command, job], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            )
        done = [process for process in active if process.poll() is not None]
        for process in done:
            active.remove(process)
            if process.returncode:
                raise SystemExit(f"a run failed with exit code {process.returncode}: {process.args}")
            records.append(json.loads(process.stdout.read()))
            write_log(options, records[-1])
            print(f"{len(records)}/{len(runs)} runs", file=sys.stderr)
        time.sleep(1.0)
    return records


def read_log(options: argparse.Namespace) -> list[dict]:
    """Records of the log, if there is one."""
    if not options.log or not options.log.exists():
        return []
    return [json.loads(line) for line in options.log.read_text().splitlines()]


def write_log(options: argparse.Namespace, record: dict) -> None:
    """Append a record to the log, if there is one."""
    if options.log:
        with options.log.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
