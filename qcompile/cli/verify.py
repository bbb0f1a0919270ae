"""`qcompile verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InvalidArgument
from ..file.load import DeployedModel, load
from ..passes.calls import at_batch, call_arguments
from ..random_tensors import random_tensors
from ..verify import verify
from .data import read_inputs, shared_parameters
from .tables import print_json


def verify_command(
    file: Path, target: str | None, bits: str | None, data: Path | None, samples: int, as_json: bool
) -> bool:
    """Verify every mode of a file (or one) and print the reports; true if all are exact."""
    if samples < 1:
        raise InvalidArgument(f"--samples must be at least 1, not {samples}")
    model = load(file, bits=bits)
    if data is None:
        inputs = random_inputs(model, samples)
    else:
        names = [one.name for one in model.signature.parameters]
        inputs = read_inputs(data, names, shared_parameters(model.signature)).part(0, samples)
    reports = [verify(model, inputs, bits=mode, target=target) for mode in model.precisions.values()]
    if as_json:
        print_json([report.to_dict() for report in reports])
    else:
        for report in reports:
            print(report)
    return all(report.exact for report in reports)


def random_inputs(model: DeployedModel, samples: int) -> Any:
    """Inputs of that many samples, as a call takes them."""
    shapes = at_batch(model.signature, model.known_shapes(), samples)
    args, kwargs = call_arguments(model.signature, random_tensors(model.signature, shapes))
    return {**dict(zip(model.signature.positional, args, strict=False)), **kwargs} if kwargs else args
