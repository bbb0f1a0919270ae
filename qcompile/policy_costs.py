"""What the policies of one model cost, without converting each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .costs import LayerCost, layer_costs
from .errors import InvalidArgument
from .latency import LatencyTable, latency_table
from .model import QuantModel
from .modes import Mode
from .pack import plane_bytes
from .passes.calls import batch_of
from .passes.layers import QuantizedLayer
from .passes.quantized_tensor import QuantizedTensor
from .policy import Policy
from .policy_rows import candidates, layers_of_policies, readers

#: Bits at which first and last layers count, whatever they run at (weight coupling, Sec. 4.1).
ENDS = 8

#: What a budget may limit, by the name that it has there.
KINDS: dict[str, Callable[[LayerCost], float]] = {
    "bitops": lambda cost: cost.bitops,
    "size": lambda cost: cost.weight_bytes,
    "latency": lambda cost: cost.seconds or 0.0,
}


@dataclass(frozen=True)
class SearchedLayer:
    """A layer whose mode a policy chooses.

    Attributes:
        name: module path.
        macs: multiply-accumulates per sample.
        weights: number of weights.
        reads_codes: whether its input is quantised, too.
        shares: layers that read the same quantised tensor, itself among them; its activation bits are the
            most of theirs.
        modes: those that it may have, increasing.
        table: how long it takes on a target, if that is known.
    """

    name: str
    macs: int
    weights: int
    reads_codes: bool
    shares: tuple[str, ...]
    modes: tuple[Mode, ...]
    table: LatencyTable | None = None

    def nearest(self, mode: Mode) -> Mode:
        """The mode, or the one of this layer with the next weight bits."""
        same = [one for one in self.modes if one.activation_bits == mode.activation_bits] or self.modes
        return next((one for one in same if one.weight_bits >= mode.weight_bits), same[-1])

    def cost(self, weight_bits: int, activation_bits: int) -> LayerCost:
        """At any bits."""
        bits = activation_bits if self.reads_codes else 32
        seconds = None if self.table is None else self.table.seconds(self.name, Mode(weight_bits, bits))
        size = weight_bits * plane_bytes(self.weights)
        return LayerCost(self.name, weight_bits, bits, self.macs, size, seconds)


@dataclass(frozen=True)
class PolicyCosts:
    """Costs of all policies of a prepared model.

    BitOPs of a layer are weight bits * activation bits * multiply-accumulates per sample; first and last
    layers count at 8 x 8 bits (weight coupling, Sec. 4.1), other layers in float at 32 x 32. Sizes are those
    of packed weights; layers in float take 4 bytes a weight.

    Attributes:
        modes: those that policies consist of, increasing.
        layers: those whose modes policies choose.
        fixed: costs of the others.
        table: seconds on a target, if latencies are known.
    """

    modes: tuple[Mode, ...]
    layers: tuple[SearchedLayer, ...]
    fixed: tuple[LayerCost, ...] = ()
    table: LatencyTable | None = None

    def of(self, policy: Policy) -> tuple[LayerCost, ...]:
        """Every layer's cost, those that have no choice first."""
        given = policy.layers
        return self.fixed + tuple(
            one.cost(given[one.name].weight_bits, max(given[name].activation_bits for name in one.shares))
            for one in self.layers
        )

    def total(self, policy: Policy, kind: str) -> float:
        """One of `KINDS`, over all layers; whole numbers but for seconds."""
        return sum(map(KINDS[kind], self.of(policy))) + self._rest(kind)

    def fixed_total(self, kind: str) -> float:
        """What layers without a choice take of it."""
        return sum(map(KINDS[kind], self.fixed)) + self._rest(kind)

    def _rest(self, kind: str) -> float:
        return self.table.rest if kind == "latency" and self.table is not None else 0

    def uniform(self, mode: Mode) -> Policy:
        """The same mode for every layer, or the next one that it has."""
        return Policy({one.name: one.nearest(mode) for one in self.layers})

    @property
    def is_tied(self) -> bool:
        """Whether weight bits determine activation bits and the other way round."""
        pairs = (
            {mode.weight_bits for mode in self.modes},
            {mode.activation_bits for mode in self.modes},
        )
        return all(len(one) == len(self.modes) for one in pairs)

    def settled(self, modes: Mapping[str, Mode]) -> Policy:
        """The policy with these modes; layers that read one tensor name the bits that it gets."""
        found = dict(modes)
        for group in [] if self.is_tied else self.groups():
            bits = max(modes[one.name].activation_bits for one in group)
            wanted = {one.name: Mode(modes[one.name].weight_bits, bits) for one in group}
            if all(wanted[one.name] in one.modes for one in group):
                found |= wanted
        return Policy(found)

    def groups(self) -> list[tuple[SearchedLayer, ...]]:
        """The layers, those together that read the same quantised tensor."""
        by_name = {one.name: one for one in self.layers}
        return [
            tuple(map(by_name.__getitem__, names))
            for names in dict.fromkeys(one.shares for one in self.layers)
        ]

    def bounds(self, kind: str) -> tuple[float, float]:
        """The least and the largest total of any policy."""
        return self.total(self.extreme(kind, min), kind), self.total(self.extreme(kind, max), kind)

    def extreme(self, kind: str, pick: Callable[..., Any]) -> Policy:
        """A policy with the least or the largest total: `pick` is min or max."""
        modes: dict[str, Mode] = {}
        for group in self.groups():
            modes |= pick(self._candidates(group, kind, pick), key=lambda one: one[0])[1]
        return self.settled(modes)

    def _candidates(
        self, group: Sequence[SearchedLayer], kind: str, pick: Callable[..., Any]
    ) -> Iterator[tuple[float, dict[str, Mode]]]:
        """Totals and modes of a group, the extreme ones among them."""
        for bits in sorted({mode.activation_bits for mode in self.modes}):
            for setting in group:  # one of them sets the bits of the tensor that all read
                found, total = {}, 0.0
                for one in group:
                    least = bits if one is setting else 0
                    costs = {
                        mode: KINDS[kind](one.cost(mode.weight_bits, bits))
                        for mode in one.modes
                        if least <= mode.activation_bits <= bits
                    }
                    if not costs:
                        break
                    found[one.name] = pick(costs, key=costs.__getitem__)
                    total += costs[found[one.name]]
                else:
                    yield total, found


def policy_costs(
    model: QuantModel, target: str | None = None, batch: int = 1, threads: int | None = None
) -> PolicyCosts:
    """Costs of the policies of a model.

    Args:
        model: from `prepare`, with activation steps that are set.
        target: where latencies are measured; without, they are not known.
        batch, threads: for latencies, as of `lower`.

    Raises:
        InvalidArgument: if modes run other layers, so that there are no policies.
        FoldError: if activation steps were never set.
    """
    if len({id(graph) for graph in model.row_graphs}) > 1:
        raise InvalidArgument(
            f"scheme {model.scheme_name!r} runs other layers in every mode, so it has no policies"
        )
    modes = tuple(mode for mode in model.prepared_modes if not (mode.is_float or mode.is_weight_only))
    if not modes:
        raise InvalidArgument("the model was prepared without a mode that quantises weights and activations")
    shapes = model.known_shapes()
    found: dict[str, LayerCost] = {}
    for cost in layer_costs(model.integer_model(modes[-1]), shapes, batch_of(model.signature, shapes) or 1):
        before = found.get(cost.name)  # a layer that is called again multiplies again
        found[cost.name] = cost if before is None else replace(cost, macs=cost.macs + before.macs)
    wanted, together = layers_of_policies(model), readers(model)
    ends = {one.name for one in model.records if one.is_end}
    fixed = [
        replace(cost, weight_bits=ENDS, activation_bits=ENDS) if name in ends else cost
        for name, cost in found.items()
        if name not in wanted
    ]
    layers = [
        SearchedLayer(
            name,
            found[name].macs if name in found else 0,
            _weights(model, name),
            name in together,
            together.get(name, (name,)),
            tuple(mode for mode in candidates(model, name) if mode in modes),
        )
        for name in wanted
    ]
    costs = PolicyCosts(modes, tuple(layers), tuple(fixed))
    if target is None:
        return costs
    own = {one.name: {mode: (one.nearest(mode), one.macs) for mode in modes} for one in layers}
    table = latency_table(model, own, target, batch, threads)
    return replace(costs, layers=tuple(replace(one, table=table) for one in layers), table=table)


def _weights(model: QuantModel, name: str) -> int:
    module = model.get_submodule(name)
    assert isinstance(module, (QuantizedLayer, QuantizedTensor))
    return module.weight.numel()
