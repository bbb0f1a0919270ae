"""Policies: a mode for every layer, and the text that they are kept as."""

from __future__ import annotations

import json
import os
import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import FileAccessError, FileFormatError, InvalidArgument, InvalidInputType
from .file.strict_json import parse_json
from .file.writer import replacing
from .modes import Mode

#: What the text says that it is.
FORMAT, VERSION = "qcompile policy", 1

#: Longer files are refused unread.
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Policy:
    """A mode for every quantised layer.

    A tensor that several layers read is quantised once, at the most activation bits that any of them wants.
    Batch normalisation runs with the parameters of the mode of the layer whose output it normalises, and
    with the policy's own statistics if it has any: `calibrate(model, batches, policy=policy)` returns it so.

    Args:
        layers: mode by module path, for example `{"layer1.0.conv1": 2, "layer1.0.conv2": "w4a4"}`; every
            quantised layer of the model that it is used with is named, but for first and last layers that
            have 8 bits in every mode.

    Raises:
        InvalidArgument: for a mode that is none.
        InvalidInputType: if `layers` is no mapping from names.
    """

    items: tuple[tuple[str, Mode], ...]
    measured: tuple[tuple[str, bytes, bytes], ...] = field(repr=False)

    def __init__(self, layers: Mapping[str, int | str | Mode]) -> None:
        if not isinstance(layers, Mapping) or not all(isinstance(name, str) for name in layers):
            raise InvalidInputType(
                f"a policy maps names of layers to modes, as in {{'conv1': 2}}, not {reprlib.repr(layers)}"
            )
        parsed = tuple(sorted((name, Mode.parse(mode)) for name, mode in layers.items()))
        object.__setattr__(self, "items", parsed)
        object.__setattr__(self, "measured", ())

    @property
    def layers(self) -> dict[str, Mode]:
        """Mode by module path."""
        return dict(self.items)

    @property
    def statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(channels,) float32 mean and variance of batch normalisation by module path, if measured."""
        return {path: (_tensor(mean), _tensor(variance)) for path, mean, variance in self.measured}

    def with_statistics(self, statistics: Mapping[str, tuple[Tensor, Tensor]]) -> Policy:
        """The same modes with statistics of batch normalisation.

        Args:
            statistics: (channels,) mean and variance by module path.
        """
        measured = tuple((path, *map(_bytes, pair)) for path, pair in sorted(statistics.items()))
        changed = Policy(self.layers)
        object.__setattr__(changed, "measured", measured)
        return changed

    @property
    def name(self) -> str:
        """As `label`."""
        return self.label

    @property
    def label(self) -> str:
        """What users see: how many layers run at which mode."""
        counts = Counter(mode for _, mode in self.items)
        return "policy " + ", ".join(f"{count} x {mode.label}" for mode, count in sorted(counts.items()))

    def to_json(self) -> str:
        """As text: the format's name and version, the mode of every layer, and statistics if there are any.

        Returns:
            JSON that `from_json` reads; equal policies give equal text.
        """
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "layers": {name: f"w{mode.weight_bits}a{mode.activation_bits}" for name, mode in self.items},
        }
        if self.measured:
            content["statistics"] = {
                path: {"mean": mean.tolist(), "variance": variance.tolist()}
                for path, (mean, variance) in self.statistics.items()
            }
        return json.dumps(content, ensure_ascii=False, indent=2) + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> Policy:
        """Read what `to_json` wrote.

        Raises:
            FileFormatError: if it is no policy, or one of a version that this release does not know.
        """
        content = parse_json(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise FileFormatError(f'no policy: a JSON object with "format": "{FORMAT}" is one')
        if content.get("version") != VERSION:
            raise FileFormatError(
                f"policy of version {reprlib.repr(content.get('version'))}; this release reads {VERSION}"
            )
        unknown = sorted(content.keys() - {"format", "version", "layers", "statistics"})
        if unknown:
            raise FileFormatError(f"a policy has no entry {reprlib.repr(unknown[0])}")
        layers = content.get("layers")
        if not isinstance(layers, dict):
            raise FileFormatError('"layers" of a policy maps names of layers to modes')
        for name, mode in layers.items():
            try:
                Mode.parse(mode)
            except InvalidArgument as cause:
                raise FileFormatError(f"layer {reprlib.repr(name)} of the policy: {cause}") from None
        policy = Policy(layers)
        statistics = content.get("statistics", {})
        if not isinstance(statistics, dict):
            raise FileFormatError('"statistics" of a policy maps names of layers to means and variances')
        return policy.with_statistics({path: _parsed(path, one) for path, one in statistics.items()})

    def save(self, path: str | PathLike[str]) -> None:
        """Write `to_json` to a file, which appears at once or not at all.

        Raises:
            FileAccessError: if the path cannot be written.
        """
        with replacing(path) as file:
            file.write(self.to_json().encode())

    @staticmethod
    def load(path: str | PathLike[str]) -> Policy:
        """Read a file that `save` wrote.

        Raises:
            FileAccessError: if the path cannot be read.
            FileFormatError: naming the file, if it holds no policy.
        """
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise FileAccessError(f"cannot read {os.fspath(path)!r}: {reason}") from error
        try:
            if len(data) > MAX_BYTES:
                raise FileFormatError(f"more than {MAX_BYTES} bytes")
            return Policy.from_json(data)
        except FileFormatError as error:
            raise FileFormatError(f"{os.fspath(path)}: {error}") from error


def _bytes(values: Tensor) -> bytes:
    return values.detach().cpu().numpy().astype("<f4").tobytes()


def _tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32))


def _parsed(path: str, given: Any) -> tuple[Tensor, Tensor]:
    """Mean and variance of one layer.

    Raises:
        FileFormatError: if they are not lists of finite numbers of one length, variances not negative.
    """
    lists = list(given.values()) if isinstance(given, dict) and given.keys() == {"mean", "variance"} else []
    numbers = [one for one in lists if isinstance(one, list) and all(map(_is_single, one))]
    if len(numbers) == 2 and len(numbers[0]) == len(numbers[1]) > 0:
        mean, variance = (torch.tensor(given[name], dtype=torch.float32) for name in ("mean", "variance"))
        if bool((variance >= 0).all()):
            return mean, variance
    raise FileFormatError(
        f"statistics of {reprlib.repr(path)} in the policy: a mean and a variance, finite and of one length, "
        "were expected"
    )


def _is_single(value: Any) -> bool:
    """Whether a JSON value is a finite number in single precision."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= torch.finfo(torch.float32).max
