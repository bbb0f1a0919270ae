"""One entry of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """How to build a network and what to call it with.

    Attributes:
        build: makes the network, with random weights.
        inputs: makes a tuple of positional inputs, or a dict of keyword inputs.
        symbolic: whether to capture without example inputs.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...] | dict[str, Any]]
    symbolic: bool = False
