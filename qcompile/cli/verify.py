"""`qcompile verify`."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import InvalidArgument
from ..file.load import load
from ..verify import verify
from .data import read_inputs
from .tables import print_json


def verify_command(
    file: Path, target: str | None, bits: str | None, data: Path | None, samples: int, as_json: bool
) -> bool:
    """Verify every mode of a file (or one) and print the reports; true if all are exact."""
    if samples < 1:
        raise InvalidArgument(f"--samples must be at least 1, not {samples}")
    model = load(file, bits=bits)
    if data is not None:
        inputs = [read_inputs(data)[:samples]]
    else:
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn((samples, *shape[1:]), generator=generator) for shape in model.known_shapes()]
    reports = [verify(model, tuple(inputs), bits=mode, target=target) for mode in model.prepared_modes]
    if as_json:
        print_json([report.to_dict() for report in reports])
    else:
        for report in reports:
            print(report)
    return all(report.exact for report in reports)
