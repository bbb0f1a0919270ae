"""Hostile `.qcm` headers: refused with one line and with memory bounded by the file's own size."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.errors import FileFormatError
from qcompile.file.container import Container

MAGIC = b"\xf1QCM\n\x1a\r\n"
FIRST_SHA256 = hashlib.sha256(b"first").hexdigest()
SECOND_SHA256 = hashlib.sha256(b"second").hexdigest()
GOOD: dict[str, Any] = {
    "format": 1,
    "producer": "qcompile 0.1.0",
    "layout": {"alignment": 64, "prefix": True},
    "sections": [
        {"name": "a", "kind": "planes", "offset": 0, "length": 5, "sha256": FIRST_SHA256},
        {"name": "b", "kind": "planes", "offset": 64, "length": 6, "sha256": SECOND_SHA256},
    ],
    "modes": [
        {"name": "w2a2", "weight_bits": 2, "activation_bits": 2, "sections": ["a"]},
        {"name": "w3a3", "weight_bits": 3, "activation_bits": None, "sections": ["a", "b"]},
    ],
    "model": {"classes": 10, "mean": [0.5, 1e-3], "name": "netz ü"},
}
BODY = b"first".ljust(64, b"\0") + b"second"


def sealed(text: bytes | str | dict[str, Any], version: int = 1) -> bytes:
    """A file around a JSON text, with a right length and a right SHA-256: written without the library."""
    if isinstance(text, dict):
        text = json.dumps(text)
    if isinstance(text, str):
        text = text.encode()
    front = MAGIC + version.to_bytes(4, "little") + len(text).to_bytes(8, "little") + text
    front += hashlib.sha256(front).digest()
    return front + b"\0" * (-len(front) % 64) + BODY


GOOD_TEXT = json.dumps(GOOD)
GOOD_FILE = sealed(GOOD)


def refusal(data: bytes) -> str:
    """Open and read all of a file that must be refused; gives the message."""
    file = io.BytesIO(data)
    file.name = "evil.qcm"  # type: ignore[attr-defined]
    with pytest.raises(FileFormatError) as caught:
        Container.open(file)
    message = str(caught.value)
    assert message.startswith("evil.qcm: ")
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_the_independent_writer_of_this_test_makes_readable_files() -> None:
    container = Container.open(io.BytesIO(GOOD_FILE))
    assert container.read("a") == b"first"
    assert container.read("b") == b"second"
    assert container.available == ("w2a2", "w3a3")
    assert container.model == GOOD["model"]


def changed(path: str, value: Any) -> dict[str, Any]:
    """The good header with one field replaced, `del` removes it: path such as `sections/0/name`."""
    header = copy.deepcopy(GOOD)
    *parents, last = path.split("/")
    place: Any = header
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    if value is KeyError:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    return header


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", 2, "header says format 2"),
        ("format", True, "format must be a whole number"),
        ("producer", 3, "producer must be"),
        ("producer", "two\nlines", "printable"),
        ("layout", [], "layout must be an object"),
        ("layout/alignment", 32, "alignment must be"),
        ("layout/prefix", 1, "prefix must be true or false"),
        ("model", [], "model must be an object"),
        ("model", KeyError, "header lacks 'model'"),
        ("extra", 1, "header has an unknown field 'extra'"),
        ("sections", {}, "sections must be a list"),
        ("sections", [], "sections must be a list of at least one"),
        ("sections/0", "a", r"sections\[0\] must be an object"),
        ("sections/0/name", "", "1 to 200 printable"),
        ("sections/0/name", "x" * 201, "1 to 200 printable"),
        ("sections/0/name", "\u202egnp.exe", "printable"),
        ("sections/1/name", "a", "section 'a' appears twice"),
        ("sections/0/kind", None, r"sections\[0\].kind"),
        ("sections/0/offset", -64, "whole number from 0"),
        ("sections/0/offset", 64, "gap or overlap"),
        ("sections/1/offset", 0, "gap or overlap"),
        ("sections/1/offset", 65, "gap or overlap"),
        ("sections/1/offset", 2**63, "whole number from 0"),
        ("sections/1/offset", 64.0, "not 64.0"),
        ("sections/0/length", True, "not True"),
        ("sections/0/length", -1, "not -1"),
        ("sections/0/length", 5.0, "not 5.0"),
        ("sections/0/length", "5", "not '5'"),
        ("sections/0/length", 2**41, "whole number from 0"),
        ("sections/1/length", 2**40, "past the limit"),
        ("sections/0/length", 65, "gap or overlap"),
        ("sections/1/length", 5, "1 bytes follow the last section"),
        ("sections/0/sha256", "0" * 63, "64 lower-case hexadecimal digits"),
        ("sections/0/sha256", "A" * 64, "64 lower-case hexadecimal digits"),
        ("sections/0/sha256", None, "64 lower-case hexadecimal digits"),
        ("sections/0/sha256", KeyError, r"sections\[0\] lacks 'sha256'"),
        ("sections/0/more", 1, r"sections\[0\] has an unknown field 'more'"),
        ("modes", [], "modes must be a list of at least one"),
        ("modes/0/name", None, r"modes\[0\].name"),
        ("modes/1/name", "w2a2", "mode 'w2a2' appears twice"),
        ("modes/0/weight_bits", 2.0, "not 2.0"),
        ("modes/0/weight_bits", True, "not True"),
        ("modes/0/activation_bits", 33, "from 1 to 32"),
        ("modes/0/sections", ["c"], "needs section 'c'"),
        ("modes/0/sections", [["a"]], "printable"),
        ("modes/0/sections", "a", "must be a list"),
        ("modes/0/sections", [], "at least one"),
        ("modes/1/sections", ["a", "a"], "twice or out of file order"),
        ("modes/1/sections", ["b", "a"], "twice or out of file order"),
        ("modes/1/sections", ["b"], "breaks the prefix rule"),
        ("modes/0/surplus", 1, r"modes\[0\] has an unknown field"),
        ("sections", [GOOD["sections"][0]] * (2**16 + 1), "at most"),
        ("modes", [GOOD["modes"][0]] * (2**10 + 1), "at most 1024"),
    ],
)
def test_a_field_that_the_format_does_not_allow_is_refused(path: str, value: Any, message: str) -> None:
    data = sealed(changed(path, value))
    with pytest.raises(FileFormatError, match=message):
        raise FileFormatError(refusal(data))


def test_modes_may_need_the_same_sections() -> None:
    data = sealed(changed("modes/0/sections", ["a", "b"]))
    assert Container.open(io.BytesIO(data)).available == ("w2a2", "w3a3")


def test_mode_lists_that_shrink_break_the_prefix_rule() -> None:
    header = copy.deepcopy(GOOD)
    header["modes"].reverse()
    assert "mode 'w2a2' breaks the prefix rule" in refusal(sealed(header))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "JSON is not valid"),
        ("null", "header must be an object"),
        ("[]", "header must be an object"),
        ("{} {}", "Extra data"),
        (b"\xef\xbb\xbf" + GOOD_TEXT.encode(), "JSON is not valid"),
        (b'{"producer": "\xff"}', "UTF-8"),
        (b'{"producer": "\xed\xa0\x80"}', "UTF-8"),
        (GOOD_TEXT.encode("utf-16"), "UTF-8"),
        ('{"format": 1, "format": 1}', "repeats the key 'format'"),
        (GOOD_TEXT.replace("0.001", "NaN"), "NaN"),
        (GOOD_TEXT.replace("0.001", "Infinity"), "Infinity"),
        (GOOD_TEXT.replace("0.001", "-Infinity"), "-Infinity"),
        (GOOD_TEXT.replace("0.001", "1e999"), "only finite"),
        (GOOD_TEXT.replace("0.001", "9" * 30), "64 bits"),
        (GOOD_TEXT.replace("0.001", "9" * 100_000), "number of 100000 characters"),
        (GOOD_TEXT.replace("0.001", "0." + "1" * 100_000), "number of 100002 characters"),
        (GOOD_TEXT.replace("0.001", '"\\ud800"'), "surrogate"),
        (GOOD_TEXT.replace("0.001", "[" * 70 + "]" * 70), "nested deeper than 64"),
        (GOOD_TEXT.replace("0.001", "[" * 100_000 + "]" * 100_000), "nested deeper than 64"),
        ("[" * 1_000_000, "nested deeper than 64"),
        ('{"a":' * 500_000, "nested deeper than 64"),
        (GOOD_TEXT.replace("0.001", "[],[" * 600_000), "at most 1048576"),
    ],
)
def test_text_beyond_plain_json_is_refused(text: str | bytes, message: str) -> None:
    assert message in refusal(sealed(text))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a .qcm file"),
        (b"PK\x03\x04 something else", "not a .qcm file"),
        (GOOD_FILE[:7], "text-mode"),
        (GOOD_FILE[:8], "cut off inside its header, after 8 bytes"),
        (GOOD_FILE[:19], "cut off inside its header, after 19 bytes"),
        (GOOD_FILE[:20], "past the end of the file"),
        (GOOD_FILE[: 20 + len(GOOD_TEXT) + 31], "past the end of the file"),
        (GOOD_FILE.replace(b"\r\n", b"\n"), "text-mode"),
        (GOOD_FILE.replace(b"\n", b"\r\n"), "text-mode"),
        (bytes(byte & 0x7F for byte in GOOD_FILE), "text-mode"),
        (GOOD_FILE.decode("latin-1").encode("utf-8"), "text-mode"),
        (GOOD_FILE.decode("utf-8", errors="replace").encode("utf-8"), "text-mode"),
        (sealed(GOOD, version=2), "format version 2 is not supported"),
        (sealed(GOOD, version=2**32 - 1), "format version 4294967295 is not supported"),
        (MAGIC + b"\x01\0\0\0" + (2**63).to_bytes(8, "little") + GOOD_FILE[20:], "over the limit"),
        (MAGIC + b"\x01\0\0\0" + b"\xff" * 8 + GOOD_FILE[20:], "over the limit"),
        (MAGIC + b"\x01\0\0\0" + (2**26).to_bytes(8, "little") + GOOD_FILE[20:], "past the end"),
        (GOOD_FILE + b"x", "1 bytes follow the last section"),
    ],
)
def test_a_file_with_a_wrong_frame_is_refused(data: bytes, message: str) -> None:
    assert message in refusal(data)


def test_every_changed_byte_of_the_header_is_noticed() -> None:
    data = bytearray(GOOD_FILE)
    for position in range(20 + len(GOOD_TEXT) + 32):
        data[position] ^= 1
        assert refusal(bytes(data))
        data[position] ^= 1


def test_a_header_whose_sections_are_all_cut_off_holds_no_mode() -> None:
    container = Container.open(io.BytesIO(GOOD_FILE[: 20 + len(GOOD_TEXT) + 32]))
    assert container.available == ()
    with pytest.raises(FileFormatError, match="modes it holds: none"):
        container.read("a")


def test_sections_far_past_the_end_cost_nothing() -> None:
    data = sealed(changed("sections/1/length", 2**39))
    assert Container.open(io.BytesIO(data)).available == ("w2a2",)
    assert peak_bytes(lambda: open_and_read_all(data)) < memory_bound(data)


def peak_bytes(action: Callable[[], object]) -> int:
    """Most memory that python objects took during `action`, above what there was before."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def open_and_read_all(data: bytes) -> None:
    """What a reader does; only the one error that files are allowed to cause may come out."""
    try:
        container = Container.open(io.BytesIO(data))
        for entry in container.sections:
            container.read(entry.name)
    except FileFormatError:
        return


def memory_bound(data: bytes) -> int:
    """Generous for small files (messages, tracebacks), a multiple of the file for large ones."""
    return 200_000 + 40 * len(data)


@pytest.mark.parametrize(
    "text",
    [
        "[" + "[]," * 500_000 + "[]]",
        "[" + "{}," * 500_000 + "{}]",
        '{"' + '":{},"'.join(f"{index}" for index in range(300_000)) + '":{}}',
        '["' + "x" * 5_000_000 + '"]',
        '["' + "x" * 2_000_000 + '\U0001f600"]',
        "9" * 5_000_000,
        "[" * 2_000_000,
    ],
    ids=["lists", "objects", "keys", "long string", "wide string", "long number", "deep"],
)
def test_texts_that_unfold_take_a_bounded_multiple_of_their_size(text: str) -> None:
    data = sealed(text)
    assert peak_bytes(lambda: open_and_read_all(data)) < memory_bound(data)


FLIPS = st.lists(st.tuples(st.integers(0, 2**16), st.integers(1, 255)), min_size=1, max_size=8)


@given(FLIPS, st.integers(0, len(GOOD_FILE)))
def test_random_damage_raises_nothing_but_the_format_error(flips: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(GOOD_FILE)
    for position, mask in flips:
        data[position % len(data)] ^= mask
    for damaged in (bytes(data), bytes(data[:cut]), GOOD_FILE[:cut]):
        peak = peak_bytes(lambda damaged=damaged: open_and_read_all(damaged))  # type: ignore[misc]
        assert peak < memory_bound(damaged)


@given(FLIPS, st.integers(0, len(GOOD_TEXT)))
def test_random_damage_under_a_right_checksum_raises_nothing_but_the_format_error(
    flips: list[tuple[int, int]], cut: int
) -> None:
    text = bytearray(GOOD_TEXT.encode())
    for position, mask in flips:
        text[position % len(text)] ^= mask
    for damaged in (sealed(bytes(text)), sealed(bytes(text[:cut]) + GOOD_TEXT[cut:].encode())):
        peak = peak_bytes(lambda damaged=damaged: open_and_read_all(damaged))  # type: ignore[misc]
        assert peak < memory_bound(damaged)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
PATHS = ["format", "producer", "layout", "layout/alignment", "layout/prefix", "model", "sections", "modes"]
PATHS += [f"sections/1/{field}" for field in GOOD["sections"][1]] + ["sections/1", "modes/0/sections/0"]
PATHS += [f"modes/1/{field}" for field in GOOD["modes"][1]] + ["modes/0"]


@given(st.sampled_from(PATHS), JSON)
def test_any_value_in_any_field_raises_nothing_but_the_format_error(path: str, value: Any) -> None:
    data = sealed(changed(path, value))
    assert peak_bytes(lambda: open_and_read_all(data)) < memory_bound(data)
