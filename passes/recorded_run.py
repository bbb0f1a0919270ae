"""One run of a float model that notes how submodules are called and what multiplies before and after them.

A submodule that is captured by itself does not show whether its first layer is the network's first. The run
follows tensors through the user's code instead: every tensor carries marks of what it was computed from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from .example_inputs import CallInputs
from .first_last import Surroundings

#: Marks of a tensor: computed from parameters alone; behind a weighted layer; (submodule, output) otherwise.
_WEIGHT, _LAYER = "weight", "layer"
_Marks = frozenset[Any]
_NONE: _Marks = frozenset()


@dataclass
class Recorded:
    """What the run notes of one submodule.

    Attributes:
        calls: its inputs, of every call.
        outputs: how many tensors the first call returned.
        behind: by input tensor, whether a weighted layer comes before it.
    """

    calls: list[CallInputs] = field(default_factory=list)
    outputs: int = 0
    behind: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class Multiplied:
    """Multiplications outside of the submodules.

    Attributes:
        path: of the module whose code multiplies.
        has_weights: whether one of the factors is made of parameters.
        number: of multiplications.
    """

    path: str
    has_weights: bool
    number: int


class RecordedRun(TorchDispatchMode):
    """Runs a model once; changes nothing but the model's own state, so give it a copy.

    Args:
        model: the model.
        names: paths of the submodules.

    Attributes:
        recorded: what was noted, by path.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.recorded = {name: Recorded() for name in names}
        self._paths = {module: path for path, module in model.named_modules()}
        self._parts = {model.get_submodule(name): name for name in reversed(names)}
        self._marks = WeakTensorKeyDictionary()
        self._stack: list[nn.Module] = []
        self._followed: set[Any] = set()
        self._outside: dict[tuple[str, bool], int] = {}
        self._model = model
        for tensor in (*model.parameters(), *model.buffers()):
            self._marks[tensor] = frozenset((_WEIGHT,))

    def run(self, inputs: CallInputs) -> None:
        """Run the model on these inputs, without gradients."""
        hooks: list[Any] = []
        for module in self._paths:
            hooks.append(module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True))
            hooks.append(module.register_forward_hook(self._leave, with_kwargs=True, always_call=True))
        attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        try:
            with torch.no_grad(), attention, self:
                self._model(*inputs.args, **inputs.kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    def surroundings(self, name: str) -> Surroundings:
        """What comes before and after one submodule."""
        found = self.recorded[name]
        follows = tuple((name, index) in self._followed for index in range(found.outputs))
        return Surroundings(tuple(found.behind), follows)

    def outside(self) -> list[Multiplied]:
        """What multiplies outside of the submodules, in the order of the run."""
        return [Multiplied(path, weights, number) for (path, weights), number in self._outside.items()]

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._stack.append(module)
        name = self._parts.get(module)
        if name is None:
            return
        found = self.recorded[name]
        behind = [_LAYER in self._of(one) for one in _tensors((args, kwargs))]
        found.behind = [a or b for a, b in zip(found.behind, behind, strict=False)] if found.calls else behind
        kept = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        found.calls.append(CallInputs(*kept))

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._stack.pop()
        name = self._parts.get(module)
        if name is not None:
            tensors = _tensors(output)
            self.recorded[name].outputs = max(self.recorded[name].outputs, len(tensors))
            for index, one in enumerate(tensors):
                self._marks[one] = self._of(one) | {(name, index)}

    def _of(self, tensor: Tensor) -> _Marks:
        marks: _Marks = self._marks.get(tensor, _NONE)
        return marks

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = _tensors((args, kwargs))
        marks = [self._of(one) for one in inputs]
        data = [one for one in marks if _WEIGHT not in one]
        multiplies = func.overloadpacket in flop_registry or _is_recurrent(func)
        if inputs and not data:
            made = frozenset((_WEIGHT,))
        else:
            made = _NONE.union(*data)
            matrices = any(
                _WEIGHT in mark and tensor.ndim > 1 for mark, tensor in zip(marks, inputs, strict=True)
            )
            if matrices and multiplies:
                self._followed |= made
            if matrices and (multiplies or func.overloadpacket is torch.ops.aten.embedding):
                made |= {_LAYER}
            if multiplies:
                self._count(func, args, kwargs or {}, result, matrices)
        for one in _tensors(result):
            self._marks[one] = made
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any, has_weights: bool) -> None:
        if any(module in self._parts for module in self._stack):
            return
        if _is_recurrent(func):
            matrices = [one for one in _tensors(args) if _WEIGHT in self._of(one) and one.ndim == 2]
            number = args[0].shape[:-1].numel() * sum(one.numel() for one in matrices)
        else:
            number = flop_registry[func.overloadpacket](*args, **kwargs, out_val=result) // 2
        key = self._paths[self._stack[-1]], has_weights
        self._outside[key] = self._outside.get(key, 0) + number


def _is_recurrent(func: Callable[..., Any]) -> bool:
    return any(kind in str(func) for kind in ("lstm", "gru", "rnn"))


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def overlapping(names: Collection[str]) -> tuple[str, str] | None:
    """Two of the paths of which one lies in the other."""
    for outer in names:
        for inner in names:
            if inner.startswith(f"{outer}."):
                return outer, inner
    return None
