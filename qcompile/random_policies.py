"""Random policies of a model in training, and the schedule of what they may draw (weight coupling)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from torch import nn

from .errors import InvalidArgument
from .modes import Mode
from .passes.batchnorm import ModeBatchNorm
from .passes.bit_candidates import BitCandidates
from .passes.bit_schedule import Form, frozen_count, instability, is_round, most_unstable
from .passes.layers import QuantizedLayer
from .passes.lsq_weights import LsqWeightQuantizer
from .passes.quantized_tensor import QuantizedTensor
from .policy import Policy
from .policy_rows import readers
from .prepared import Prepared
from .ranks import of_first_rank, whole

Weighted = QuantizedLayer | QuantizedTensor


class RandomPolicies:
    """Draws policies. All state is in the model's `BitCandidates`, so that its state dict is enough to go on.

    Args:
        model: of scheme `coupled`. Its config's seed and the number of steps so far decide what is drawn, the
            same on every rank.
    """

    def __init__(self, model: Prepared) -> None:
        self._config = model.scheme.config
        self._parts = {f"{path}." if path else "": part for path, part in model.parts.items()}
        self._candidates = {
            prefix: next(one for one in part.modules() if isinstance(one, BitCandidates))
            for prefix, part in self._parts.items()
        }
        self._readers = {
            prefix + name: tuple(prefix + one for one in together)
            for prefix, part in self._parts.items()
            for name, together in readers(part).items()
        }

    def layers(self) -> Iterator[tuple[str, Weighted]]:
        """What has candidates, by path in the whole model."""
        for prefix, candidates in self._candidates.items():
            for name in candidates.weight_bits:
                layer = self._parts[prefix].get_submodule(name)
                assert isinstance(layer, (QuantizedLayer, QuantizedTensor))
                yield prefix + name, layer

    def current(self) -> dict[str, tuple[int, ...]]:
        """Weight candidates of every layer at present."""
        return {
            prefix + name: bits
            for prefix, candidates in self._candidates.items()
            for name, bits in candidates.current().items()
        }

    def draw(self, count: int) -> list[Policy]:
        """Policies for one training step, every choice equally likely.

        Layers that read one tensor get the same activation bits, as it is quantised once.
        """
        first = next(iter(self._candidates.values()))
        chance = random.Random(f"{self._config.seed} {int(first.step)}")
        first.step.add_(1)
        weight_bits, found = self.current(), []
        for _ in range(count):
            activation_bits: dict[str, int] = {}
            for name in weight_bits:
                if name not in activation_bits:
                    bits = chance.choice(first.activation_bits)
                    activation_bits |= dict.fromkeys(self._readers.get(name, (name,)), bits)
            found.append(
                Policy(
                    {
                        name: Mode(chance.choice(bits), activation_bits[name])
                        for name, bits in weight_bits.items()
                    }
                )
            )
        return found

    def at_smallest(self, policy: Policy) -> frozenset[str]:
        """Layers that it runs at the smallest of their weight candidates at present."""
        smallest = {name: bits[0] for name, bits in self.current().items()}
        return frozenset(name for name, mode in policy.items if mode.weight_bits == smallest.get(name))

    def normalisations_of(self, layers: frozenset[str]) -> list[nn.Module]:
        """Batch normalisation behind these layers."""
        return [
            module
            for prefix, part in self._parts.items()
            for module in part.modules()
            if isinstance(module, ModeBatchNorm) and any(prefix + one in layers for one in module.layers[:1])
        ]

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Choose anew which layers lose their smallest candidate, if the schedule says so.

        Args:
            epoch: that begins, from 0.
            epochs: of the whole training.
        """
        for value, name in ((epoch, "epoch"), (epochs, "epochs")):
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidArgument(f"{name}={value!r} is not a whole number")
        if not 0 <= epoch < epochs:
            raise InvalidArgument(f"epoch {epoch} is not one of 0 to {epochs - 1}")
        states = list(self._candidates.values())
        if int(states[0].epoch) == epoch:
            return  # a loop that goes on within it
        states[0].epoch.fill_(epoch)
        if not (self._config.schedule and is_round(epoch, epochs)):
            return
        form: Form = self._config.unstable
        weight_bits, current = self._all_candidates(), self.current()
        criteria = {
            name: _instability(layer, weight_bits[name] if form == "paper" else current[name], form)
            for name, layer in self.layers()
            if len(weight_bits[name]) > 1
        }
        chosen = most_unstable(criteria, frozen_count(len(criteria), epoch, epochs))
        for prefix, candidates in self._candidates.items():
            candidates.freeze(frozenset(one.removeprefix(prefix) for one in chosen if one.startswith(prefix)))
            candidates.frozen.copy_(of_first_rank(candidates.frozen))

    def _all_candidates(self) -> dict[str, tuple[int, ...]]:
        return {
            prefix + name: bits
            for prefix, candidates in self._candidates.items()
            for name, bits in candidates.weight_bits.items()
        }


def _instability(layer: Weighted, candidates: Sequence[int], form: Form) -> float:
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, LsqWeightQuantizer)
    steps = dict(zip(quantizer.widths, whole(quantizer.step), strict=True))
    return instability(whole(layer.weight), steps, candidates, form)
