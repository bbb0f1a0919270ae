"""Architectures that nobody here designed, each prepared, calibrated, verified, saved and loaded.

    python tests/zoo.py > docs/zoo.md       all of them, as the table in the documentation
    python tests/zoo.py --only resnet       one of them, with the traceback if it fails
    python tests/zoo.py --resume out.jsonl  continues where that file ends

Each runs in a process of its own, with a limit on time and memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import zoo_images
import zoo_language
import zoo_plain
import zoo_transformers
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo_entry import Architecture

import qcompile
from qcompile.model import QuantModel
from qcompile.passes.schemes.vertical import VerticalConfig

ZOO: dict[str, Architecture] = zoo_images.ZOO | zoo_language.ZOO | zoo_transformers.ZOO | zoo_plain.ZOO
BITS = (2, 8)
SHARE = 0.9  # of the multiplications must be quantised
SECONDS = 600
MEMORY = 8 * 2**30  # of the address space


@dataclass(frozen=True)
class Outcome:
    """What became of one architecture; what it did not reach is False."""

    name: str
    kind: str = ""
    captured: str = ""
    share: float = 0.0
    differ: bool = False
    exact: bool = False
    reloads: bool = False
    error: str = ""

    @property
    def passed(self) -> bool:
        return not self.error


def examine(name: str) -> Outcome:
    """Take one architecture all the way, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    architecture = ZOO[name]
    model, inputs = architecture.build(), architecture.inputs()
    _see_noise(model, inputs)
    examples = None if architecture.symbolic else inputs
    config = VerticalConfig(first_last=8, products=True)
    ready = qcompile.prepare(model, examples, scheme="vertical", bits=BITS, config=config)
    qcompile.calibrate(ready, [inputs])
    ready.eval()
    outputs = {bits: _tensors(qcompile.at(ready, bits), inputs) for bits in BITS}
    low, high = outputs.values()
    reports = [qcompile.verify(ready, inputs, bits=bits) for bits in BITS]
    outcome = Outcome(
        name,
        type(model).__name__,
        {"export": "torch.export", "fx": "torch.fx"}[ready.method],
        qcompile.summary(ready).quantized_share,
        not all(map(torch.equal, low, high)),
        all(one.exact for one in reports),
        _reloads(ready, inputs, outputs),
    )
    wrong = {
        f"{100 * outcome.share:.1f} % of the multiplications are quantised": outcome.share < SHARE,
        "the outputs of both modes are equal": not outcome.differ,
        "; ".join(one.failures[0] for one in reports if one.failures): not outcome.exact,
        "other outputs after loading": not outcome.reloads,
    }
    return Outcome(**(vars(outcome) | {"error": "; ".join(text for text, found in wrong.items() if found)}))


def _see_noise(model: nn.Module, inputs: Any) -> None:
    """Statistics of batch normalisation fit random weights, so that signals neither vanish nor explode."""
    norms = [one for one in model.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    momenta = [one.momentum for one in norms]
    for one in norms:
        one.momentum = None  # averages, from the first batch on
    model.train()
    with torch.no_grad():
        _call(model, inputs)
    for one, momentum in zip(norms, momenta, strict=True):
        one.momentum = momentum
    model.eval()


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


@torch.no_grad()
def _tensors(model: nn.Module, inputs: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(_call(model, inputs))
    return [one for one in leaves if isinstance(one, Tensor)]


def _reloads(ready: QuantModel, inputs: Any, outputs: dict[int, list[Tensor]]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.qcm")
        qcompile.save(ready, path)
        loaded = {bits: _tensors(qcompile.load(path, bits=bits), inputs) for bits in BITS}
    return all(all(map(torch.equal, loaded[bits], outputs[bits])) for bits in BITS)


def examine_apart(name: str) -> Outcome:
    """The same in a process of its own: a crash, a hang or greed for memory is a line in the table."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers", "qcompile.passes.schemes.vertical"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_outcome, args=(name, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(SECONDS):
            process.kill()
            return Outcome(name, error=f"no result within {SECONDS} s")
        return receiver.recv()
    except EOFError:
        process.join()
        return Outcome(name, error=f"the process ended with {process.exitcode}")
    finally:
        process.join()


def _send_outcome(name: str, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        outcome = examine(name)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this architecture's line
        text = " ".join(str(error).split())
        known = isinstance(error, qcompile.errors.QCompileError)
        outcome = Outcome(name, error=text if known else f"{type(error).__name__}: {text}")
    sender.send(outcome)


def table(outcomes: list[Outcome]) -> Iterator[str]:
    """The documentation's page, line by line."""
    packages = ", ".join(
        f"{one} {version(one).partition('+')[0]}" for one in ("torch", "pytorchcv", "transformers")
    )
    passed = sum(one.passed for one in outcomes)
    yield f"""# Architectures

Written by `python tests/zoo.py > docs/zoo.md`, with {packages}.
Random weights, reduced sizes, `scheme="vertical"`, modes of {BITS[0]} and {BITS[1]} bits,
`VerticalConfig(first_last=8, products=True)`, calibrated on noise, verified, saved and
loaded. An architecture passes if at least {100 * SHARE:.0f} % of its
multiplications are quantised, the outputs of both modes differ, both are exact, and a loaded model gives the
same outputs. {passed} of {len(outcomes)} pass; [limitations.md](limitations.md) has a way out for the others.

| architecture | class | captured by | quantised % | exact | error |
| --- | --- | --- | --- | --- | --- |"""
    for one in outcomes:
        share = f"{100 * one.share:.1f}" if one.captured else ""
        exact = ("yes" if one.exact else "no") if one.captured else ""
        error = one.error.replace("|", "\\|")
        yield f"| {one.name} | {one.kind} | {one.captured} | {share} | {exact} | {error} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=ZOO, metavar="NAME", help="one architecture, in this process")
    parser.add_argument("--resume", type=Path, help="a file of outcomes, one a line, that is continued")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    arguments = parser.parse_args()
    if arguments.only:
        print(examine(arguments.only))
        return

    path: Path | None = arguments.resume
    lines = path.read_text().splitlines() if path is not None and path.exists() else []
    known = {one.name: one for one in (Outcome(**json.loads(line)) for line in lines)}

    def outcome_of(name: str) -> Outcome:
        if name in known:
            return known[name]
        outcome = examine_apart(name)
        print(f"{name}: {outcome.error or 'passes'}", file=sys.stderr, flush=True)
        if path is not None:
            with path.open("a") as log:
                log.write(json.dumps(vars(outcome)) + "\n")
        return outcome

    with ThreadPoolExecutor(arguments.jobs) as pool:
        print("\n".join(table(list(pool.map(outcome_of, ZOO)))))


if __name__ == "__main__":
    main()
