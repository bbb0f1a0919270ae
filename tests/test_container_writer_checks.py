"""The writer of `.qcm` files refuses whatever a reader would refuse, before it touches the disk."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompile.errors import InvalidArgument, InvalidInputType
from qcompile.file.container import ModeEntry, Section, write_container

A, B = Section("a", "blob", b"a"), Section("b", "blob", b"b")


def endless() -> dict[str, Any]:
    loop: dict[str, Any] = {}
    loop["again"] = loop
    return loop


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"x": math.nan}, "finite"),
        ({"x": math.inf}, "finite"),
        ({"x": 2**64}, "64 bits"),
        ({1: "x"}, "keys are strings"),
        ({"x": (1, 2)}, "tuple is not a JSON type"),
        ({"x": np.int64(3)}, "int64 is not a JSON type"),
        ({"x": b"bytes"}, "bytes is not a JSON type"),
        ({"x": "\ud800"}, "surrogate"),
        (endless(), "nested deeper"),
        ({"x": [0] * (1 << 20)}, "more than 1048576 values"),
        ([], "model must be an object"),
    ],
)
def test_metadata_that_is_not_plain_json_is_refused(model: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=message):
        write_container(tmp_path / "model.qcm", [A], [ModeEntry("w2a2", 2, 2, ("a",))], model)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("sections", "modes", "message"),
    [
        ([], [ModeEntry("w2a2", 2, 2, ("a",))], "sections must be a list of at least one"),
        ([A], [], "modes must be a list of at least one"),
        ([A, A], [ModeEntry("w2a2", 2, 2, ("a",))], "section 'a' appears twice"),
        ([A], [ModeEntry("w2a2", 2, 2, ("b",))], "needs section 'b'"),
        ([A], [ModeEntry("w2a2", 2, 2, ())], "at least one"),
        ([A], [ModeEntry("w2a2", 0, 2, ("a",))], "from 1 to 32, not 0"),
        ([A], [ModeEntry("w2a2", True, 2, ("a",))], "from 1 to 32, not True"),
        ([A], [ModeEntry("two\nlines", 2, 2, ("a",))], "printable"),
        ([Section("x" * 201, "blob", b"")], [ModeEntry("w2a2", 2, 2, ("a",))], "printable"),
        ([A], [ModeEntry("m", 2, 2, ("a",)), ModeEntry("m", 3, 3, ("a",))], "mode 'm' appears twice"),
    ],
)
def test_tables_that_no_reader_accepts_are_refused(
    sections: list[Section], modes: list[ModeEntry], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        write_container(tmp_path / "model.qcm", sections, modes, {})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "modes",
    [
        [ModeEntry("w2a2", 2, 2, ("b",))],
        [ModeEntry("w2a2", 2, 2, ("a", "b")), ModeEntry("w3a3", 3, 3, ("a",))],
    ],
)
def test_modes_that_are_no_nested_prefixes_are_refused_where_that_is_promised(
    modes: list[ModeEntry], tmp_path: Path
) -> None:
    write_container(tmp_path / "model.qcm", [A, B], modes, {}, prefix=False)
    with pytest.raises(InvalidArgument, match="breaks the prefix rule"):
        write_container(tmp_path / "prefix.qcm", [A, B], modes, {}, prefix=True)
    assert os.listdir(tmp_path) == ["model.qcm"]


@pytest.mark.parametrize("data", ["text", [1, 2], memoryview(b"abcd")[::2]])
def test_a_section_holds_contiguous_bytes(data: Any) -> None:
    with pytest.raises(InvalidInputType, match="section 'a'"):
        Section("a", "blob", data)
