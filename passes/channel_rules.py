"""Where the channels of a tensor are after an operator with one input, by operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from .aten import AVERAGE, ELEMENTWISE, MAX_POOL, arguments_of
from .channel_variables import Segment, Variables, features

Shape = tuple[int, ...]
Path = tuple[int, ...]

#: An argument, most often a tensor: the call, and the path into its args.
Use = tuple[fx.Node, Path]


@dataclass(frozen=True)
class Channels:
    """The channel dimension of a tensor.

    Attributes:
        dim: which dimension it is, from 0.
        segments: what lies along it, in order.
    """

    dim: int
    segments: tuple[Segment, ...]

    @property
    def features(self) -> int:
        """Size of the dimension at full width."""
        return features(self.segments)


@dataclass(frozen=True)
class Moved:
    """What an operator makes of its input's channels.

    Attributes:
        channels: those of the result; None if it has no channel dimension.
        counts: arguments, by their path in the call's args, that say a number of features: of which segments.
    """

    channels: Channels | None
    counts: Mapping[Path, tuple[Segment, ...]] = field(default_factory=dict)


# (call, channels of its input, shapes of input and result, variables) -> None: not understood
Rule = Callable[[fx.Node, Channels, Shape, Shape, Variables], "Moved | None"]


def _same(node: fx.Node, channels: Channels, before: Shape, after: Shape, _: Variables) -> Moved | None:
    return Moved(channels)


def _spatial(node: fx.Node, channels: Channels, before: Shape, after: Shape, _: Variables) -> Moved | None:
    # windows slide over the dimensions behind the channels
    return Moved(channels) if channels.dim == 1 and len(before) > 2 else None


def _moved_to(channels: Channels, dim: int) -> Channels:
    return Channels(dim, channels.segments)


def _dims(value: Any, ndim: int) -> list[int]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [int(dim) % ndim for dim in values]


def _reduce(node: fx.Node, channels: Channels, before: Shape, after: Shape, _: Variables) -> Moved | None:
    given = arguments_of(node)
    dims = _dims(given["dim"], len(before)) if given.get("dim") not in (None, []) else range(len(before))
    if channels.dim in dims:
        # a mean over fewer channels is the same statistic; a sum is another number
        return Moved(None) if node.target._schema.name in ("aten::mean", "aten::amax") else None  # type: ignore[union-attr]
    gone = 0 if given.get("keepdim") else sum(dim < channels.dim for dim in dims)
    return Moved(_moved_to(channels, channels.dim - gone))


def _reshape(node: fx.Node, channels: Channels, before: Shape, after: Shape, _: Variables) -> Moved | None:
    moved = _regrouped(channels, before, after)
    if moved is None or not isinstance(node.args[1], (list, tuple)):
        return None
    if node.args[1][moved.dim] == -1:
        return Moved(moved)
    return Moved(moved, {(1, moved.dim): moved.segments})


def _flatten(node: fx.Node, channels: Channels, before: Shape, after: Shape, _: Variables) -> Moved | None:
    moved = _regrouped(channels, before, after)
    return None if moved is None else Moved(moved)


def _unflatten(node: fx.Node, channels: Channels, before: Shape, after: Shape, _: Variables) -> Moved | None:
    moved = _regrouped(channels, before, after)
    if moved is None:
        return None
    given = arguments_of(node)
    place = moved.dim - int(given["dim"]) % len(before)
    names_it = 0 <= place < len(given["sizes"]) and given["sizes"][place] != -1
    return Moved(moved, {(2, place): moved.segments} if names_it else {})


def _regrouped(channels: Channels, before: Shape, after: Shape) -> Channels | None:
    """Channels of a tensor of the same elements in the same order."""
    outer, size = math.prod(before[: channels.dim]), before[channels.dim]
    places = [
        dim for dim in range(len(after)) if math.prod(after[:dim]) == outer and (after[dim] > 1 or size == 1)
    ]
    if not places:
        return None
    dim = places[0]
    if after[dim] >= size:
        inner = [
            math.prod(before[channels.dim + 1 : end]) for end in range(channels.dim + 1, len(before) + 1)
        ]
        if after[dim] % size or after[dim] // size not in inner:
            return None
        times = after[dim] // size
        runs = [one.run * times for one in channels.segments]
    else:
        if size % after[dim] or any(one.run % (size // after[dim]) for one in channels.segments):
            return None
        runs = [one.run // (size // after[dim]) for one in channels.segments]
    segments = zip(channels.segments, runs, strict=True)
    return Channels(dim, tuple(Segment(one.variable, one.size, run) for one, run in segments))


def _expand(node: fx.Node, channels: Channels, before: Shape, after: Shape, _: Variables) -> Moved | None:
    dim = channels.dim + len(after) - len(before)
    if after[dim] != before[channels.dim]:
        return None
    sizes = node.args[1]
    names_it = isinstance(sizes, (list, tuple)) and sizes[dim] != -1
    return Moved(_moved_to(channels, dim), {(1, dim): channels.segments} if names_it else {})


def _squeeze(node: fx.Node, channels: Channels, before: Shape, after: Shape, _: Variables) -> Moved | None:
    dim = arguments_of(node).get("dim")
    asked = range(len(before)) if dim is None else _dims(dim, len(before))
    gone = [one for one in asked if before[one] == 1]
    if channels.dim in gone:
        return None
    return Moved(_moved_to(channels, channels.dim - sum(one < channels.dim for one in gone)))


def _unsqueeze(node: fx.Node, channels: Channels, before: Shape, after: Shape, _: Variables) -> Moved | None:
    dim = int(arguments_of(node)["dim"]) % len(after)
    return Moved(_moved_to(channels, channels.dim + (dim <= channels.dim)))


def _permute(node: fx.Node, channels: Channels, before: Shape, after: Shape, _: Variables) -> Moved | None:
    return Moved(_moved_to(channels, _dims(arguments_of(node)["dims"], len(before)).index(channels.dim)))


def _transpose(node: fx.Node, channels: Channels, before: Shape, after: Shape, _: Variables) -> Moved | None:
    given = arguments_of(node)
    one, other = _dims([given["dim0"], given["dim1"]], len(before))
    return Moved(_moved_to(channels, {one: other, other: one}.get(channels.dim, channels.dim)))


def _slice(node: fx.Node, channels: Channels, before: Shape, after: Shape, _: Variables) -> Moved | None:
    return Moved(channels) if int(arguments_of(node)["dim"]) % len(before) != channels.dim else None


def _select(node: fx.Node, channels: Channels, before: Shape, after: Shape, _: Variables) -> Moved | None:
    dim = int(arguments_of(node)["dim"]) % len(before)
    return None if dim == channels.dim else Moved(_moved_to(channels, channels.dim - (dim < channels.dim)))


def _pad(
    node: fx.Node, channels: Channels, before: Shape, after: Shape, variables: Variables
) -> Moved | None:
    """Zeros along the channels are channels of their own, as in shortcuts that only pad."""
    given = arguments_of(node)
    amounts: Sequence[Any] = given["pad"]
    place = 2 * (len(before) - 1 - channels.dim)
    if place >= len(amounts) or not any(amounts[place : place + 2]):
        return Moved(channels)
    below, above = amounts[place : place + 2]
    if not all(isinstance(one, int) and one >= 0 for one in (below, above)):
        return None
    if given.get("mode", "constant") != "constant" or given.get("value"):
        return None
    front, back = (tuple(variables.new(one) for one in (amount,) if one) for amount in (below, above))
    counts: dict[Path, tuple[Segment, ...]] = {(1, place): front, (1, place + 1): back}
    return Moved(Channels(channels.dim, (*front, *channels.segments, *back)), counts)


#: Rules by the operator's name; operators that are not here are not understood.
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE - {"prelu"}, _same),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "contiguous", "clone", "alias"), _same),
    **dict.fromkeys(("detach", "add", "sub", "mul", "div", "pow", "rsub"), _same),  # with a number
    **dict.fromkeys((MAX_POOL | AVERAGE) - {"mean", "amax"}, _spatial),
    **dict.fromkeys(("adaptive_max_pool1d", "adaptive_max_pool3d", "max_pool2d_with_indices"), _spatial),
    **dict.fromkeys((f"upsample_nearest{n}d" for n in (1, 2, 3)), _spatial),
    **dict.fromkeys(("upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d"), _spatial),
    **dict.fromkeys(("mean", "sum", "amax"), _reduce),
    **dict.fromkeys(("reshape", "view"), _reshape),
    "flatten": _flatten,
    "unflatten": _unflatten,
    "expand": _expand,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "permute": _permute,
    "transpose": _transpose,
    "slice": _slice,
    "select": _select,
    "pad": _pad,
    "constant_pad_nd": _pad,
}
