"""`qcompile eval`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InvalidArgument
from ..file.load import load
from ..lower import lower
from ..switching import at
from .data import Inputs, read_labelled, shared_parameters
from .tables import print_json, print_table


def evaluate_command(
    file: Path, data: Path, bits: str | None, target: str | None, batch: int, as_json: bool
) -> None:
    """Print top-1 accuracy per mode."""
    if batch < 1:
        raise InvalidArgument(f"--batch must be at least 1, not {batch}")
    model = load(file, bits=bits)
    names = [one.name for one in model.signature.parameters]
    x, y = read_labelled(data, names, shared_parameters(model.signature))
    rows: list[dict[str, Any]] = []
    for label, mode in model.precisions.items():
        run: Callable[..., Any] = at(model, mode)
        if target is not None:
            run = lower(model, target, bits=mode, batch=batch, chunk=True)
        accuracy = top1(run, x, y, batch)
        rows.append({"mode": label, "target": target or "torch", "samples": len(y), "accuracy %": accuracy})
    print_json(rows) if as_json else print_table(f"Accuracy of {file.name}", rows)


def top1(run: Callable[..., Any], inputs: Inputs, labels: Tensor, batch: int) -> float:
    """Top-1 accuracy in percent.

    Args:
        run: called with keyword inputs.
        inputs: the samples.
        labels: (samples,) int64.
        batch: samples per call.

    Raises:
        InvalidArgument: if the model does not return (batch, classes).
    """
    correct = 0
    for start in range(0, len(labels), batch):
        given = inputs.part(start, start + batch)
        wanted = labels[start : start + batch]
        outputs = run(**given)
        if not isinstance(outputs, Tensor) or outputs.dim() != 2:
            raise InvalidArgument("accuracy needs a model that returns one tensor of (batch, classes)")
        correct += int((outputs[: len(wanted)].argmax(1) == wanted).sum())
    return 100.0 * correct / len(labels)
