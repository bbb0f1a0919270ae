"""How close a lowered model comes to what the machine could do at most: the roofline.

The least time of a call is the longer one of two: its multiply-additions by the best instruction for bytes,
and reading its packed weights from memory. The share of the peak is that time over the measured one. It is
not clipped at 1: bit-serial kernels multiply bits, several times as many per second as an instruction for
bytes multiplies bytes, and weights that stay in a cache are not read from memory.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from .backends.kept_json import keep, machine_name, place_of, read_kept
from .backends.target import Executable, Peak
from .costs import layer_costs
from .version import __version__


def machine_peak(run: Executable) -> Peak | None:
    """Measured with the instructions and threads of an executable, or as it was before on this machine.

    Returns:
        None where a runtime of others runs, or another machine's code.
    """
    kind = run.kind()
    if kind is None:
        return None
    path = place_of("peak", [machine_name(), __version__, run.target, kind, run.request.threads])
    known = _read(path)
    if known is not None:
        return known
    found = run.measure_peak()
    if found is not None:
        keep(path, vars(found))
    return found


def _read(path: Path) -> Peak | None:
    """A peak that was kept; anything else in its place counts as none."""
    content = read_kept(path)
    with suppress(ValueError, KeyError, TypeError):
        found = Peak(str(content["instruction"]), float(content["products"]), float(content["bandwidth"]))
        return found if found.products > 0 and found.bandwidth > 0 else None
    return None


def least_seconds(run: Executable, peak: Peak) -> float:
    """Of one call; layers in float count as if they multiplied bytes.

    Raises:
        InvalidArgument: if the graph cannot run on the shapes that it was lowered for.
    """
    request = run.request
    costs = layer_costs(request.model, request.input_shapes, request.batch)
    products = request.batch * sum(one.macs for one in costs)
    weights = sum(one.weight_bytes for one in costs)
    return max(products / peak.products, weights / peak.bandwidth)
