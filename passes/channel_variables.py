"""Which channels of which tensors have to be kept together: variables, united by union-find."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Consecutive channels that one variable stands for.

    Attributes:
        variable: its number in `Variables`.
        size: number of channels.
        run: consecutive features that belong to each channel: the pixels after flattening, the multiplier
            of a depthwise convolution.
    """

    variable: int
    size: int
    run: int = 1


class Variables:
    """The widths that a narrower branch may choose.

    Every variable stands for some channels, of which a branch keeps the leading ones. Tensors that are added
    share variables; where they consist of different parts, variables are split into the common ones.
    """

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._size: list[int] = []
        self._blocks: list[int] = []
        self._fixed: list[bool] = []
        self._parts: dict[int, tuple[int, int]] = {}

    def new(self, size: int, fixed: bool = False) -> Segment:
        """A new variable for `size` channels; one that is fixed keeps all of them."""
        self._parent.append(len(self._parent))
        self._size.append(size)
        self._blocks.append(1)
        self._fixed.append(fixed)
        return Segment(self._parent[-1], size)

    def expand(self, segments: Sequence[Segment]) -> tuple[Segment, ...]:
        """The same channels by the variables that they are united with and split into."""
        found: list[Segment] = []
        left = list(reversed(segments))
        while left:
            segment = left.pop()
            root = self._root(segment.variable)
            parts = self._parts.get(root)
            if parts is None:
                found.append(Segment(root, self._size[root], segment.run))
            else:
                left += [Segment(part, self._size[part], segment.run) for part in reversed(parts)]
        return tuple(found)

    def fix(self, segments: Sequence[Segment]) -> None:
        """Keep all of these channels."""
        for segment in self.expand(segments):
            self._fixed[segment.variable] = True

    def unite(self, one: Sequence[Segment], other: Sequence[Segment]) -> None:
        """Keep the same features of both lists; all of them where their parts cannot be matched."""
        if features(one) != features(other):
            self.fix(one)
            self.fix(other)
            return
        while True:
            left, right = self.expand(one), self.expand(other)
            pairs = list(zip(left, right, strict=False))
            uneven = next(((a, b) for a, b in pairs if (a.size, a.run) != (b.size, b.run)), None)
            if uneven is None:
                break
            narrow, wide = sorted(uneven, key=lambda segment: segment.size)
            if narrow.run != wide.run or not self._split(wide.variable, narrow.size):
                self.fix(left)
                self.fix(right)
                return
        for a, b in pairs:
            self._merge(a.variable, b.variable)

    def align(self, segments: Sequence[Segment], groups: int) -> None:
        """Keep equally many channels, the leading ones, of each of `groups` equal groups."""
        own = self.expand(segments)
        if len(own) == 1 and own[0].run == 1 and own[0].size % groups == 0:
            root = own[0].variable
            self._blocks[root] = math.lcm(self._blocks[root], groups)
        else:
            self.fix(own)

    def kept(self, segments: Sequence[Segment], ratio: float) -> tuple[int, ...]:
        """Indices, in the full list of features, of those that stay when every variable keeps `ratio` of it.

        At least one channel (of every group, where there are groups) stays.
        """
        found: list[int] = []
        start = 0
        for segment in self.expand(segments):
            size, blocks = segment.size, self._blocks[segment.variable]
            block = size // blocks
            width = min(block, max(1, math.floor(ratio * block + 0.5)))
            width = block if self._fixed[segment.variable] else width
            for first in range(0, size, block):
                found += range(start + first * segment.run, start + (first + width) * segment.run)
            start += size * segment.run
        return tuple(found)

    def _root(self, variable: int) -> int:
        while self._parent[variable] != variable:
            self._parent[variable] = self._parent[self._parent[variable]]
            variable = self._parent[variable]
        return variable

    def _merge(self, one: int, other: int) -> None:
        one, other = self._root(one), self._root(other)
        if one != other:
            self._parent[other] = one
            self._fixed[one] |= self._fixed[other]
            self._blocks[one] = math.lcm(self._blocks[one], self._blocks[other])

    def _split(self, variable: int, size: int) -> bool:
        """Replace a variable by its first `size` channels and the others; not where groups cross the cut."""
        if self._blocks[variable] > 1:
            return False
        sizes = (size, self._size[variable] - size)
        first, second = (self.new(one, self._fixed[variable]).variable for one in sizes)
        self._parts[variable] = (first, second)
        return True


def features(segments: Sequence[Segment]) -> int:
    """The number of features that a list of segments stands for."""
    return sum(segment.size * segment.run for segment in segments)
