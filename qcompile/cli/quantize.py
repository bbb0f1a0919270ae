"""`qcompile quantize`."""

from __future__ import annotations

from pathlib import Path

from ..calibrate import calibrate
from ..errors import InvalidArgument
from ..file.save import save
from ..prepare import prepare
from .data import read_inputs
from .factory import build, load_weights, parameters_of, read_weights, width


def quantize_command(
    factory: str,
    weights: Path | None,
    scheme: str,
    bits: str | None,
    modes: str | None,
    skip: list[str],
    data: Path,
    batch: int,
    output: Path,
) -> None:
    """Build the float model, prepare and calibrate it, and write the file."""
    if batch < 1:
        raise InvalidArgument(f"--batch must be at least 1, not {batch}")
    model = build(factory)
    inputs = read_inputs(data, parameters_of(model))
    if weights is not None:
        load_weights(model, weights, read_weights(weights))
    widths = None if bits is None else [width(one) for one in bits.split(",")]
    names = None if modes is None else modes.split(",")
    prepared = prepare(model.eval(), inputs.part(0, 2), scheme=scheme, bits=widths, modes=names, skip=skip)
    starts = range(0, len(inputs), batch)
    calibrate(prepared, (inputs.part(start, start + batch) for start in starts), progress=True)
    save(prepared.eval(), output)
    print(f"wrote {output}")
