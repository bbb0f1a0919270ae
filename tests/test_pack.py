"""Bit-planes: what is packed unpacks again, and every prefix of the planes is a code of fewer bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.errors import FileFormatError, InvalidArgument, InvalidInputType
from qcompile.pack import code_range, pack_planes, plane_bytes, split_planes, unpack_planes

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def coded_arrays(draw: st.DrawFn) -> tuple[np.ndarray, int, bool]:
    """Codes, their bits, and whether they are signed."""
    bits, signed, shape = draw(st.integers(1, 8)), draw(st.booleans()), draw(SHAPES)
    low, high = code_range(bits, signed)
    numel = int(np.prod(shape, dtype=np.int64))
    values = draw(st.lists(st.integers(low, high), min_size=numel, max_size=numel))
    fitting = [np.int16, np.int64, np.int8 if signed else np.uint8]
    return np.array(values, dtype=draw(st.sampled_from(fitting))).reshape(shape), bits, signed


def pack_bit_by_bit(values: list[int], bits: int, plane: int) -> bytes:
    """The reference: python integers, one bit at a time."""
    packed = [0] * ((len(values) + 7) // 8)
    for index, value in enumerate(values):
        two_complement = value % 2**bits
        bit = (two_complement // 2 ** (bits - 1 - plane)) % 2
        packed[index // 8] += bit * 2 ** (index % 8)
    return bytes(packed)


@given(coded_arrays(), st.data())
def test_packing_equals_the_bit_by_bit_reference(
    coded: tuple[np.ndarray, int, bool], data: st.DataObject
) -> None:
    codes, bits, signed = coded
    first = data.draw(st.integers(0, bits))
    last = data.draw(st.integers(first, bits))
    values = [int(value) for value in codes.flatten()]
    expected = b"".join(pack_bit_by_bit(values, bits, plane) for plane in range(first, last))
    assert pack_planes(codes, bits, signed, first, last) == expected


@given(coded_arrays())
def test_unpacking_all_planes_gives_the_codes_back(coded: tuple[np.ndarray, int, bool]) -> None:
    codes, bits, signed = coded
    planes = [pack_planes(codes, bits, signed, plane, plane + 1) for plane in range(bits)]
    unpacked = unpack_planes(planes, codes.shape, signed)
    assert unpacked.dtype == (np.int8 if signed else np.uint8)
    assert unpacked.shape == codes.shape
    np.testing.assert_array_equal(unpacked, codes)


@given(coded_arrays())
def test_the_first_planes_are_the_code_shifted_right(coded: tuple[np.ndarray, int, bool]) -> None:
    codes, total, signed = coded
    planes = [pack_planes(codes, total, signed, plane, plane + 1) for plane in range(total)]
    for bits in range(1, total + 1):
        # Floor division of python integers: the mathematical meaning of the arithmetic shift.
        expected = [int(value) // 2 ** (total - bits) for value in codes.flatten()]
        assert unpack_planes(planes[:bits], codes.shape, signed).flatten().tolist() == expected


@given(coded_arrays())
def test_planes_packed_together_split_into_single_planes(coded: tuple[np.ndarray, int, bool]) -> None:
    codes, bits, signed = coded
    together = pack_planes(codes, bits, signed, 0, bits)
    assert len(together) == bits * plane_bytes(codes.size)
    singles = [pack_planes(codes, bits, signed, plane, plane + 1) for plane in range(bits)]
    assert [bytes(plane) for plane in split_planes(together, codes.size, bits)] == singles


def test_every_code_of_every_width_survives() -> None:
    for bits in range(1, 9):
        for signed in (False, True):
            low, high = code_range(bits, signed)
            codes = np.arange(low, high + 1, dtype=np.int16)
            planes = split_planes(pack_planes(codes, bits, signed, 0, bits), codes.size, bits)
            np.testing.assert_array_equal(unpack_planes(planes, codes.shape, signed), codes)


def test_first_element_sits_in_the_lowest_bit_and_the_top_plane_comes_first() -> None:
    codes = np.array([[2, 0, 1], [0, 3, 0], [0, 0, 2]], dtype=np.uint8)
    assert pack_planes(codes, 2, False, 0, 2) == bytes([0b00010001, 0b1, 0b00010100, 0b0])


def test_transposed_codes_are_packed_in_the_order_they_are_seen() -> None:
    codes = np.arange(12, dtype=np.int8).reshape(3, 4).T
    assert pack_planes(codes, 4, False, 0, 4) == pack_planes(codes.copy(order="C"), 4, False, 0, 4)


def test_packing_leaves_the_codes_alone() -> None:
    codes = np.array([-2, 1], dtype=np.int8)
    pack_planes(codes, 2, True, 0, 2)
    assert codes.tolist() == [-2, 1]


@pytest.mark.parametrize(
    ("code", "bits", "signed"), [(4, 2, False), (-1, 2, False), (2, 2, True), (-3, 2, True), (300, 8, False)]
)
def test_a_code_out_of_range_is_refused(code: int, bits: int, signed: bool) -> None:
    with pytest.raises(InvalidArgument, match=f"code {code} does not fit into {bits}"):
        pack_planes(np.array([0, code], dtype=np.int16), bits, signed, 0, bits)


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (0, 4), (2, 1)])
def test_planes_that_do_not_exist_are_refused(first: int, last: int) -> None:
    with pytest.raises(InvalidArgument, match="do not exist"):
        pack_planes(np.zeros(3, dtype=np.uint8), 3, False, first, last)


@pytest.mark.parametrize("bits", [0, 9])
def test_widths_outside_one_to_eight_are_refused(bits: int) -> None:
    with pytest.raises(InvalidArgument, match="from 1 to 8"):
        pack_planes(np.zeros(3, dtype=np.uint8), bits, False, 0, 0)
    with pytest.raises(InvalidArgument, match="from 1 to 8"):
        unpack_planes([b"\0"] * bits, (3,), signed=False)


@pytest.mark.parametrize("codes", [np.zeros(3, dtype=np.float32), np.zeros(3, dtype=bool), [1, 2]])
def test_only_integer_arrays_are_packed(codes: np.ndarray) -> None:
    with pytest.raises(InvalidInputType, match="array of integers"):
        pack_planes(codes, 2, False, 0, 2)


@pytest.mark.parametrize("length", [0, 1, 3])
def test_a_plane_of_the_wrong_length_is_refused(length: int) -> None:
    with pytest.raises(
        FileFormatError, match=f"bit-plane 1 of shape \\(9,\\) has {length} bytes instead of 2"
    ):
        unpack_planes([b"\0\0", b"\0" * length], (9,), signed=False)


def test_stray_bits_behind_the_last_element_are_refused() -> None:
    with pytest.raises(FileFormatError, match="stray bits"):
        unpack_planes([b"\0\2"], (9,), signed=False)


def test_a_huge_shape_is_refused_before_anything_is_allocated() -> None:
    with pytest.raises(FileFormatError, match="instead of"):
        unpack_planes([b"\0"], (2**40, 2**40), signed=False)


@pytest.mark.parametrize("shape", [(-1,), (1.5,), (True,), (0, 2**62, 2**62), (1,) * 100])
def test_what_is_no_shape_is_refused(shape: tuple[int, ...]) -> None:
    planes = [b"\0" if 0 not in shape else b""]
    with pytest.raises(InvalidArgument, match="shape"):
        unpack_planes(planes, shape, signed=False)


@pytest.mark.parametrize(("length", "numel"), [(3, 9), (6, 9), (1, 0)])
def test_planes_of_another_total_length_are_refused(length: int, numel: int) -> None:
    with pytest.raises(
        FileFormatError, match=f"2 bit-planes of {numel} elements take .* bytes, not {length}"
    ):
        split_planes(b"\0" * length, numel, 2)


def test_a_negative_number_of_elements_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="negative"):
        plane_bytes(-1)
