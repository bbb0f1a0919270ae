"""Arrays in a section: what is encoded is decoded, and damaged bytes are refused."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompile.errors import FileFormatError, InvalidArgument, InvalidInputType
from qcompile.file.tensors import decode_tensors, encode_tensors

DTYPES = ["uint8", "int8", "int16", "int32", "int64", "float32", "float64", "bool"]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
ARRAYS = st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, SHAPES))
NAMES = st.text(st.characters(codec="ascii", min_codepoint=32, max_codepoint=126), max_size=8)


def raw(header: Any, body: bytes = b"") -> bytes:
    """A safetensors text made by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@given(st.dictionaries(NAMES, ARRAYS, max_size=4))
def test_arrays_survive_bit_for_bit(tensors: dict[str, np.ndarray]) -> None:
    decoded = decode_tensors(encode_tensors(tensors))
    assert list(decoded) == sorted(tensors)
    for name, value in tensors.items():
        assert decoded[name].dtype == value.dtype
        assert decoded[name].shape == value.shape
        assert decoded[name].tobytes() == value.tobytes()


def test_transposed_strided_and_big_endian_arrays_keep_their_values() -> None:
    plain = np.arange(12, dtype=np.int16).reshape(3, 4)
    tensors = {"transposed": plain.T, "strided": plain[:, ::2], "big": plain.astype(">i2")}
    decoded = decode_tensors(encode_tensors(tensors))
    for name, value in tensors.items():
        np.testing.assert_array_equal(decoded[name], value)


def test_the_order_of_the_mapping_does_not_change_the_bytes() -> None:
    tensors = {f"t{index}": np.zeros(index % 3 + 1, dtype=DTYPES[index % 8]) for index in range(20)}
    names = list(tensors)
    random.Random(0).shuffle(names)
    assert encode_tensors({name: tensors[name] for name in names}) == encode_tensors(tensors)


def test_decoded_arrays_are_writable() -> None:
    decoded = decode_tensors(encode_tensors({"a": np.zeros(3, dtype=np.float32)}))
    decoded["a"][0] = 1
    assert decoded["a"].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    "value", [np.zeros(2, dtype=np.float16), np.zeros(2, dtype=complex), [1, 2], np.float64(1)]
)
def test_other_types_are_refused(value: Any) -> None:
    with pytest.raises(InvalidInputType, match="tensor 'a' must be"):
        encode_tensors({"a": value})


@pytest.mark.parametrize("name", ["__metadata__", "\ud800", "two\nlines", 3])
def test_names_that_cannot_be_read_again_are_refused(name: Any) -> None:
    with pytest.raises(InvalidArgument, match="cannot name a tensor"):
        encode_tensors({name: np.zeros(1)})


def test_more_tensors_than_can_be_read_again_are_refused() -> None:
    tensor = np.zeros(0, dtype=np.uint8)
    with pytest.raises(InvalidArgument, match="cannot encode 100000 tensors"):
        encode_tensors({f"t{index}": tensor for index in range(100_000)})


HOSTILE = {
    "empty": b"",
    "short": b"\0" * 7,
    "header past the end": (2**60).to_bytes(8, "little") + b"{}",
    "no object": raw([]),
    "no entry": raw({"a": 1}),
    "deep": raw(b"[" * 100_000),
    "not a number": raw(b'{"a": NaN}'),
    "not UTF-8": raw(b'{"\xff": 1}'),
    "repeated name": raw(b'{"a":%b,"a":%b}' % ((json.dumps(entry("U8", [1], 0, 1)).encode(),) * 2), b"a"),
    "metadata": raw({"__metadata__": {"a": "b"}}),
    "other dtype": raw({"a": entry("F16", [1], 0, 2)}, b"ab"),
    "packed dtype": raw({"a": entry("F4", [2], 0, 1)}, b"a"),
    "dtype is a list": raw({"a": {**entry("U8", [1], 0, 1), "dtype": ["U8"]}}, b"a"),
    "hole": raw({"a": entry("U8", [1], 1, 2)}, b"ab"),
    "overlap": raw({"a": entry("U8", [2], 0, 2), "b": entry("U8", [1], 1, 2)}, b"ab"),
    "trailing bytes": raw({"a": entry("U8", [1], 0, 1)}, b"ab"),
    "past the end": raw({"a": entry("U8", [2**40], 0, 2**40)}, b"ab"),
    "shape too small": raw({"a": entry("U8", [1], 0, 2)}, b"ab"),
    "shape overflows": raw({"a": entry("U8", [2**63, 2], 0, 2)}, b"ab"),
    "empty shape overflows": raw({"a": entry("U8", [0, 2**62, 2**62], 0, 0)}),
    "negative size": raw({"a": entry("U8", [-1], 0, 1)}, b"a"),
    "too many dimensions": raw({"a": entry("U8", [1] * 100, 0, 1)}, b"a"),
    "bool of 2": raw({"a": entry("BOOL", [2], 0, 2)}, b"\x01\x02"),
    "name of two lines": raw({"a\nb": entry("U8", [1], 0, 1)}, b"a"),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(FileFormatError, match="tensors are damaged") as caught:
        decode_tensors(data)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


GOOD = encode_tensors({"scale": np.linspace(0, 1, 5), "codes": np.arange(6, dtype=np.int8).reshape(2, 3)})


@given(st.lists(st.tuples(st.integers(0, 2**16), st.integers(1, 255)), max_size=4), st.integers(0, len(GOOD)))
def test_random_damage_raises_nothing_but_the_format_error(flips: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(GOOD)
    for position, mask in flips:
        data[position % len(data)] ^= mask
    for damaged in (bytes(data), bytes(data[:cut])):
        with contextlib.suppress(FileFormatError):
            decode_tensors(damaged)


def test_hostile_bytes_are_refused_within_little_memory() -> None:
    # The safetensors reader allocates outside python, where only the system sees it: hence a process of its
    # own with a limit on its address space, set after the imports.
    pytest.importorskip("resource")
    script = (
        "import resource, sys\n"
        "from qcompile.file.tensors import decode_tensors\n"
        "from qcompile.errors import FileFormatError\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "limit = used + (64 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "for text in sys.stdin:\n"
        "    try:\n"
        "        decode_tensors(bytes.fromhex(text))\n"
        "    except FileFormatError:\n"
        "        print('refused')\n"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    lines = "".join(f"{data.hex()}\n" for data in HOSTILE.values())
    done = subprocess.run(
        [sys.executable, "-c", script], input=lines, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["refused"] * len(HOSTILE)
