"""The integer graphs that eval mode runs: folded when first needed, dropped when the model changes."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .modes import ActiveMode, Mode
from .passes.calls import at_batch, sample_shapes
from .passes.integer_model import IntegerModel
from .policy import Policy
from .policy_rows import policy_of

if TYPE_CHECKING:
    from .model import QuantModel

_Key = tuple["Mode | Policy", tuple[tuple[int, ...], ...]]


class FoldedModes:
    """A cache of integer graphs by mode and input shapes; several threads may ask at once."""

    def __init__(self) -> None:
        self._graphs: dict[_Key, IntegerModel] = {}
        #: By mode, the graph that holds for every open size; None if there is none.
        self._for_all_sizes: dict[Mode | Policy, IntegerModel | None] = {}
        self._fingerprint: tuple[Any, ...] = ()
        self._lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldedModes:
        """Empty: graphs are folded again on demand."""
        return FoldedModes()

    def clear(self) -> None:
        """Forget all graphs."""
        with self._lock:
            self._graphs, self._for_all_sizes = {}, {}

    def graph(
        self, model: QuantModel, precision: Mode | Policy, shapes: Sequence[Sequence[int]]
    ) -> IntegerModel:
        """The graph of one mode, folded anew if a parameter or buffer changed since."""
        fingerprint = _fingerprint(model)
        # integer graphs leave the batch open
        key = (precision, sample_shapes(model.signature, shapes))
        with self._lock:
            if fingerprint != self._fingerprint:
                self._graphs, self._for_all_sizes, self._fingerprint = {}, {}, fingerprint
            if key not in self._graphs:
                self._graphs[key] = self._of_new_sizes(model, precision, shapes)
            return self._graphs[key]

    def _of_new_sizes(
        self, model: QuantModel, precision: Mode | Policy, shapes: Sequence[Sequence[int]]
    ) -> IntegerModel:
        """At the second set of sizes it is found out whether there must be a third graph."""
        from .size_independence import holds_for_every_size

        known = self._for_all_sizes.get(precision)
        if known is not None:
            return known
        graph = model.converted(precision, shapes)
        if precision not in self._for_all_sizes and any(one == precision for one, _ in self._graphs):
            holds = holds_for_every_size(model, precision, graph, shapes)
            self._for_all_sizes[precision] = graph if holds else None
        return graph


def _fingerprint(model: QuantModel) -> tuple[Any, ...]:
    """Changes with every write to a parameter or buffer.

    Version counters see in-place writes; the norms see writes through `.data`, which they miss.
    """
    tensors = [*model.parameters(), *model.buffers()]
    floats = [tensor.detach() for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    norms = tuple(torch.stack([n.double() for n in torch._foreach_norm(floats)]).tolist()) if floats else ()
    return tuple((tensor._version, tensor.data_ptr()) for tensor in tensors), norms


#: Models by handle, for compiled code, which cannot carry Python objects.
_MODELS: weakref.WeakValueDictionary[int, QuantModel] = weakref.WeakValueDictionary()

_HANDLES = itertools.count()


def handle_of(model: QuantModel) -> int:
    """A number by which compiled code finds this model for as long as it lives."""
    handle = next(_HANDLES)
    _MODELS[handle] = model
    return handle


def run_integers(model: QuantModel, active: ActiveMode, inputs: Sequence[Tensor]) -> Any:
    """Run the folded graph of the active mode, in full precision whatever autocast says.

    Compiled code calls it as one opaque operator: it looks for changed parameters each time, and executes the
    very same integers.
    """
    if torch.compiler.is_compiling():
        number = torch.tensor(active.row) if active.number is None else active.number
        return tuple(
            torch.ops.qcompile.run_folded(
                list(inputs), model.model_handle, number, active.rows, active.statistics
            )
        )
    return _run(model, active, inputs)


def _run(model: QuantModel, active: ActiveMode, inputs: Sequence[Tensor]) -> Any:
    precision = model.prepared_modes[active.row] if active.policy is None else active.policy
    device = inputs[0].device.type if inputs else "cpu"
    with torch.no_grad(), torch.autocast(device, enabled=False):
        # floats are float32 in integer graphs, whatever the parameters were converted to
        found = [one.float() if one.is_floating_point() else one for one in inputs]
        return model.integer_model(precision, [tuple(one.shape) for one in inputs])(*found)


@torch.library.custom_op("qcompile::run_folded", mutates_args=())
def run_folded(
    inputs: Sequence[Tensor], handle: int, number: Tensor, rows: Tensor | None, statistics: Tensor | None
) -> list[Tensor]:
    """`run_integers` for compiled code: flat tensors in, flat tensors out."""
    model = _MODELS[handle]
    policy = None if rows is None else policy_of(model, rows.tolist(), statistics)
    active = ActiveMode(int(number), rows, policy=policy)
    # operators may not return what they were given
    return [one.clone() for one in _run(model, active, inputs)]


@run_folded.register_fake
def _(
    inputs: Sequence[Tensor], handle: int, number: Tensor, rows: Tensor | None, statistics: Tensor | None
) -> list[Tensor]:
    model = _MODELS[handle]
    with unset_fake_temporarily():
        found = _output_shapes(model, [one.shape for one in inputs], [one.dtype for one in inputs])
    known = zip(inputs, model.signature.inputs, strict=True)
    batch = next((given.shape[0] for given, one in known if one.is_batched), 1)
    return [
        inputs[0].new_empty(shape if share == 0 else [batch * share, *shape[1:]], dtype=dtype)
        for share, shape, dtype in found
    ]


def _output_shapes(
    model: QuantModel, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]
) -> list[tuple[int, tuple[int, ...], torch.dtype]]:
    """(rows per sample or 0, sizes, dtype) of every output; those of one mode are those of all."""
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    small, large = (
        _run(
            model,
            ActiveMode(),
            [
                torch.zeros(tuple(map(int, shape)), dtype=dtype, device=device)
                for shape, dtype in zip(at_batch(model.signature, shapes, batch), dtypes, strict=True)
            ],
        )
        for batch in (2, 4)
    )
    return [
        (0 if one.shape == other.shape else one.shape[0] // 2, tuple(one.shape), one.dtype)
        for one, other in zip(small, large, strict=True)
    ]
