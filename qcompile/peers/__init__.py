"""Other runtimes of a float model, to compare latencies with: what users would deploy without qcompile.

A peer is opened with a model and one batch; what it returns runs that batch on as many threads as others.
Peers that quantise take their ranges from the batch, as latencies do not depend on them.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from importlib.metadata import version

from torch import Tensor, nn

from qcompile.errors import InvalidArgument, MissingExtra

Run = Callable[[], object]
Opener = Callable[[nn.Module, Sequence[Tensor], int], Run]

#: name -> (module, function that opens it, distributions that it needs)
PEERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "torch": ("torch_peers", "eager", ("torch",)),
    "torch-bf16": ("torch_peers", "bfloat16", ("torch",)),
    "torch-compile": ("torch_peers", "compiled", ("torch",)),
    "onnxruntime": ("onnxruntime_peers", "in_float", ("onnxruntime", "onnx", "onnxscript")),
    "onnxruntime-int8": ("onnxruntime_peers", "in_int8", ("onnxruntime", "onnx", "onnxscript")),
    "openvino": ("openvino_peers", "in_float", ("openvino",)),
    "openvino-bf16": ("openvino_peers", "in_bfloat16", ("openvino",)),
    "openvino-int8": ("openvino_peers", "in_int8", ("openvino", "nncf")),
}


def open_peer(name: str, model: nn.Module, inputs: Sequence[Tensor], threads: int) -> Run:
    """Load a float model into another runtime.

    Args:
        name: of `PEERS`.
        model: float model; it is copied.
        inputs: one batch, in the order of `forward`'s parameters.
        threads: of one call.

    Returns:
        A function that runs the batch once.

    Raises:
        InvalidArgument: for an unknown name.
        MissingExtra: if the runtime is not installed.
    """
    if name not in PEERS:
        raise InvalidArgument(f"{name!r} is none of the peers {', '.join(PEERS)}")
    module, function, _ = PEERS[name]
    try:
        opener: Opener = getattr(importlib.import_module(f"{__name__}.{module}"), function)
        return opener(copy.deepcopy(model).eval(), inputs, threads)
    except ImportError as cause:
        raise MissingExtra(
            f"the peer {name} needs {cause.name or 'a package'}: pip install 'qcompile[peers]'"
        ) from cause


def versions(name: str) -> str:
    """Packages that a peer runs with, as `name version, ...`."""
    return ", ".join(f"{one} {version(one)}" for one in PEERS[name][2])


__all__ = ["PEERS", "open_peer", "versions"]
