"""Weight decay that spares what random policies used at the smallest bits (weight coupling, Sec. 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .errors import InvalidInputType
from .passes.lsq_weights import LsqWeightQuantizer
from .random_policies import RandomPolicies


def spared(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    """The weights inside of the range of the codes, zeros elsewhere; the shape of `weight`.

    Args:
        weight: any shape.
        step: () size of a code.
        bits: of the codes -2^(b-1) .. 2^(b-1) - 1.
    """
    ratio = weight / step
    inside = (ratio >= -(2 ** (bits - 1))) & (ratio <= 2 ** (bits - 1) - 1)
    return torch.where(inside, weight, 0.0)


class FairDecay:
    """Cancels the decay of an optimiser for these weights, once in each of its steps.

    Decay that the optimiser adds to the gradient is taken off the gradient before the step; decay that
    shrinks the weight itself, as that of AdamW, is given back after it.

    Args:
        optimizer: of torch, or what wraps one as its `optimizer`.
        policies: of the model.

    Raises:
        InvalidInputType: if it is no optimiser.
    """

    def __init__(self, optimizer: Any, policies: RandomPolicies) -> None:
        while not isinstance(optimizer, torch.optim.Optimizer):
            optimizer = getattr(optimizer, "optimizer", None)
            if optimizer is None:
                raise InvalidInputType("optimizer must be a torch.optim.Optimizer, or wrap one")
        self._policies = policies
        self._used: dict[str, int] = {}
        self._given_back: list[tuple[Tensor, Tensor]] = []
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def note(self, layers: dict[str, int]) -> None:
        """Weight bits of the layers that ran at their smallest ones since the last step."""
        for name, bits in layers.items():
            self._used[name] = max(bits, self._used.get(name, 0))

    def _spared(self) -> Iterator[tuple[Tensor, Callable[[], Tensor]]]:
        for name, layer in self._policies.layers():
            if name in self._used:
                quantizer, bits = layer.weight_quantizer, self._used[name]
                assert isinstance(quantizer, LsqWeightQuantizer)
                step = quantizer.step[quantizer.widths.index(bits)]
                yield layer.weight, lambda w=layer.weight, s=step, b=bits: spared(w, s, b)  # type: ignore[misc]

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = {id(one): group for group in optimizer.param_groups for one in group["params"]}
        self._given_back = []
        for weight, values in self._spared():
            group = groups.get(id(weight), {})
            decay = group.get("weight_decay", 0.0)
            if not decay or weight.grad is None:
                continue
            if group.get("decoupled_weight_decay", False):
                self._given_back.append((weight, values() * (group["lr"] * decay)))
            else:
                sign = -1.0 if group.get("maximize", False) else 1.0
                weight.grad.sub_(values().to(weight.grad.dtype) * decay, alpha=sign)
        self._used.clear()

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        for weight, lost in self._given_back:
            weight.add_(lost)
        self._given_back = []
