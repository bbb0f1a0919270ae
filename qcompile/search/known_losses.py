"""Losses that a search has computed, in a file from which it goes on.

Searches are deterministic: started again with what they knew, they go the same way and compute nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcompile.errors import FileAccessError, FileFormatError, InvalidArgument
from qcompile.file.strict_json import parse_json
from qcompile.file.writer import replacing
from qcompile.modes import Mode
from qcompile.policy import Policy
from qcompile.ranks import AgreementOfRanks

FORMAT, VERSION = "qcompile search", 1

#: Longer files are refused unread.
MAX_BYTES = 256 << 20


class KnownLosses:
    """A file of losses.

    Args:
        path: of the file; it need not exist yet.
        key: of what the losses are of, see `fingerprint`.
        layers: whose modes policies choose, in a fixed order.

    Raises:
        FileAccessError: if a file that exists cannot be read.
        FileFormatError: if it is no such file.
        InvalidArgument: if its losses are of another model, other batches or another option, or ranks read
            different ones.
    """

    def __init__(self, path: str | PathLike[str], key: str, layers: Sequence[str]) -> None:
        self._path, self._key, self._layers = path, key, tuple(layers)
        self.losses: dict[Policy, float] = self._read() if os.path.exists(path) else {}
        count = torch.tensor([float(len(self.losses)), -float(len(self.losses))])
        most, least = AgreementOfRanks().largest(count).tolist()
        if most != -least:  # they would wait for each other's losses
            raise InvalidArgument(
                f"ranks read different losses from {os.fspath(path)!r}: the checkpoint must lie in a "
                "folder that all of them share"
            )

    def write(self, losses: dict[Policy, float]) -> None:
        """Replace the file.

        Raises:
            FileAccessError: if the path cannot be written.
        """
        pairs = ((one.layers, loss) for one, loss in losses.items())
        content = {
            "format": FORMAT,
            "version": VERSION,
            "key": self._key,
            "layers": self._layers,
            "losses": [[[modes[name].name for name in self._layers], loss] for modes, loss in pairs],
        }
        with replacing(self._path) as file:
            file.write(json.dumps(content, ensure_ascii=False).encode())

    def _read(self) -> dict[Policy, float]:
        name = os.fspath(self._path)
        try:
            with open(self._path, "rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise FileAccessError(f"cannot read {name!r}: {error.strerror or error}") from error
        try:
            content = parse_json(data) if len(data) <= MAX_BYTES else None
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise FileFormatError(f'a JSON object with "format": "{FORMAT}" was expected')
            if content.get("version") != VERSION:
                raise FileFormatError(f"this release reads version {VERSION}")
            if content.get("key") == self._key and content.get("layers") == list(self._layers):
                return dict(map(self._entry, content["losses"]))
        except (FileFormatError, InvalidArgument, KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{name}: no file of a search ({error})") from error
        raise InvalidArgument(
            f"{name!r} holds losses of another model, other batches or other options: name another file, or "
            "delete it"
        )

    def _entry(self, row: Any) -> tuple[Policy, float]:
        names, loss = row
        if len(names) != len(self._layers) or isinstance(loss, bool) or not math.isfinite(loss):
            raise ValueError("a loss is malformed")
        return Policy(dict(zip(self._layers, map(Mode.parse, names), strict=True))), loss


def fingerprint(state: Iterable[tuple[str, Any]], batches: Iterable[Any], options: Sequence[object]) -> str:
    """A hash of all that losses depend on.

    Args:
        state: names and tensors of the model.
        batches: of the search.
        options: everything else, as far as its text tells.
    """
    found = hashlib.sha256(repr(tuple(options)).encode())
    for name, value in state:
        found.update(name.encode())
        _add(found, value)
    for leaf in pytree.tree_leaves(list(batches)):
        _add(found, leaf)
    return found.hexdigest()


def _add(found: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        found.update(f"{tuple(value.shape)} {value.dtype}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    else:
        found.update(repr(value).encode())
