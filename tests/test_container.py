"""The `.qcm` container: what is written is read back, range by range, whole or cut off."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.errors import FileAccessError, FileFormatError, InvalidArgument, InvalidInputType
from qcompile.file.container import Container, ModeEntry, Section, write_container

SECTIONS = (
    Section("meta", "tensors", b"scales and steps"),
    Section("planes.2", "planes", bytes(range(256))),
    Section("planes.3", "planes", b"\x5a" * 64),
    Section("planes.4", "planes", b"third"),
)
MODES = (
    ModeEntry("w2a2", 2, 2, ("meta", "planes.2")),
    ModeEntry("w3a3", 3, 3, ("meta", "planes.2", "planes.3")),
    ModeEntry("w4a4", 4, 4, ("meta", "planes.2", "planes.3", "planes.4")),
)
TEXT = st.text(st.characters(codec="utf-8"), max_size=5)
MODEL = {"input": [1, 3, 32, 32], "scale": 0.1, "labels": ["grün", None, True], "deep": {"a": {"b": -1}}}


class RecordingFile(io.BytesIO):
    """Notes the ranges that are read."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.ranges: list[tuple[int, int]] = []

    def read(self, size: int | None = -1) -> bytes:
        start = self.tell()
        self.ranges.append((start, -1 if size is None else size))
        return super().read(size)


class DribblingFile(io.BytesIO):
    """Gives at most seven bytes a read, as raw and network files may."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size or 0, 7))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.qcm"
    write_container(path, SECTIONS, MODES, MODEL, prefix=True)
    return path


def test_what_is_written_is_read_back(file: Path) -> None:
    with Container.open(file) as container:
        assert container.modes == MODES
        assert container.model == MODEL
        assert container.prefix
        assert container.header.producer.startswith("qcompile ")
        assert [(entry.name, entry.kind) for entry in container.sections] == [
            (s.name, s.kind) for s in SECTIONS
        ]
        assert {s.name: container.read(s.name) for s in SECTIONS} == {s.name: s.data for s in SECTIONS}
        assert container.sections_of("w3a3") == ("meta", "planes.2", "planes.3")


def test_the_bytes_follow_the_documented_layout(file: Path) -> None:
    data = file.read_bytes()
    assert data[:12] == b"\xf1QCM\n\x1a\r\n" + b"\x01\0\0\0"
    length = int.from_bytes(data[12:20], "little")
    header = json.loads(data[20 : 20 + length])
    assert header["format"] == 1
    assert header["layout"] == {"alignment": 64, "prefix": True}
    assert data[20 + length : 52 + length] == hashlib.sha256(data[: 20 + length]).digest()
    start = -(-(52 + length) // 64) * 64
    assert not any(data[52 + length : start])
    for entry, section in zip(header["sections"], SECTIONS, strict=True):
        at = start + entry["offset"]
        assert at % 64 == 0
        assert data[at : at + entry["length"]] == section.data
        assert entry["sha256"] == hashlib.sha256(section.data).hexdigest()
    assert len(data) == start + header["sections"][-1]["offset"] + len(SECTIONS[-1].data)


def test_equal_arguments_give_equal_bytes(file: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.qcm"
    write_container(again, SECTIONS, MODES, dict(reversed(MODEL.items())), prefix=True)
    assert again.read_bytes() == file.read_bytes()


@given(
    datas=st.lists(st.binary(max_size=200), min_size=1, max_size=5),
    model=st.dictionaries(TEXT, TEXT | st.floats(allow_nan=False, allow_infinity=False), max_size=4),
)
def test_any_sections_and_metadata_survive(
    tmp_path_factory: pytest.TempPathFactory, datas: list[bytes], model: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("any") / "model.qcm"
    sections = [Section(f"s{index}", "blob", data) for index, data in enumerate(datas)]
    write_container(path, sections, [ModeEntry("float", None, None, ("s0",))], model)
    with Container.open(path) as container:
        assert container.model == model
        assert [container.read(section.name) for section in sections] == datas


def test_opening_reads_the_header_and_reading_reads_one_section(file: Path) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[12:20], "little")
    recorder = RecordingFile(data)
    container = Container.open(recorder)
    assert recorder.ranges == [(0, 20), (20, length + 32)]
    recorder.ranges.clear()
    container.read("planes.3")
    entry = next(entry for entry in container.sections if entry.name == "planes.3")
    assert recorder.ranges == [(container.data_start + entry.offset, entry.length)]


def test_a_file_object_may_give_fewer_bytes_than_asked_for(file: Path) -> None:
    container = Container.open(DribblingFile(file.read_bytes()))
    assert container.read("planes.2") == bytes(range(256))


def test_a_file_object_stays_open_and_a_path_is_closed(file: Path) -> None:
    with open(file, "rb") as mine:
        with Container.open(mine):
            pass
        assert not mine.closed
    with Container.open(file) as container:
        pass
    with pytest.raises(FileAccessError, match="closed"):
        container.read("meta")


def test_a_sliced_file_lists_all_modes_and_reads_those_it_holds(file: Path, tmp_path: Path) -> None:
    with Container.open(file) as container:
        assert container.available == ("w2a2", "w3a3", "w4a4")
        cuts = {mode.name: container.end_of(mode.name) for mode in MODES}
    for count, mode in enumerate(MODES, start=1):
        small = tmp_path / f"{mode.name}.qcm"
        small.write_bytes(file.read_bytes()[: cuts[mode.name]])
        with Container.open(small) as container:
            assert container.modes == MODES
            assert container.available == tuple(held.name for held in MODES[:count])
            for name in mode.sections:
                assert container.read(name) == next(s.data for s in SECTIONS if s.name == name)


def test_a_missing_section_says_that_the_file_was_sliced_and_what_it_holds(file: Path) -> None:
    with Container.open(file) as container:
        cut = container.end_of("w3a3")
    os.truncate(file, cut)
    with Container.open(file) as container, pytest.raises(FileFormatError) as caught:
        container.read("planes.4")
    message = str(caught.value)
    assert str(file) in message
    assert "'planes.4' is missing, the file was truncated or sliced; modes it holds: w2a2, w3a3" in message


def test_one_byte_less_than_a_mode_needs_makes_it_unavailable(file: Path) -> None:
    with Container.open(file) as container:
        cut = container.end_of("w3a3") - 1
    os.truncate(file, cut)
    with Container.open(file) as container:
        assert container.available == ("w2a2",)
        with pytest.raises(FileFormatError, match="truncated or sliced"):
            container.read("planes.3")


def test_appending_the_cut_bytes_gives_the_whole_file_back(file: Path) -> None:
    whole = file.read_bytes()
    with Container.open(file) as container:
        cut = container.end_of("w2a2")
    os.truncate(file, cut)
    with open(file, "ab") as small:
        small.write(whole[cut:])
    with Container.open(file) as container:
        assert container.available == ("w2a2", "w3a3", "w4a4")
        assert container.read("planes.4") == b"third"


def test_every_changed_byte_of_a_section_is_noticed(file: Path) -> None:
    data = bytearray(file.read_bytes())
    with Container.open(file) as container:
        start, entry = container.data_start, container.sections[1]
    for position in range(start + entry.offset, start + entry.end):
        data[position] ^= 1
        container = Container.open(io.BytesIO(data))
        with pytest.raises(FileFormatError, match=r"section 'planes.2' is damaged \(its SHA-256 differs\)"):
            container.read("planes.2")
        assert container.read("meta") == b"scales and steps"
        data[position] ^= 1


def test_a_file_that_shrinks_while_it_is_open_is_noticed(file: Path) -> None:
    with Container.open(file) as container:
        os.truncate(file, container.data_start + 3)
        with pytest.raises(FileFormatError, match="became shorter"):
            container.read("meta")


def test_names_that_the_file_does_not_list_are_refused(file: Path) -> None:
    with Container.open(file) as container:
        with pytest.raises(InvalidArgument, match="no section 'nothing'"):
            container.read("nothing")
        with pytest.raises(InvalidArgument, match="no mode 'w8a8'; the file lists: w2a2, w3a3, w4a4"):
            container.sections_of("w8a8")


def test_a_text_file_object_is_refused(file: Path) -> None:
    with open(file, encoding="latin-1") as text, pytest.raises(InvalidInputType, match="binary mode"):
        Container.open(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["missing.qcm", ".", "nul\0.qcm", "line\nbreak.qcm"])
def test_a_path_that_cannot_be_opened_gives_one_line(path: str, tmp_path: Path) -> None:
    with pytest.raises(FileAccessError, match="cannot open") as caught:
        Container.open(f"{tmp_path}/{path}")
    assert "\n" not in str(caught.value)


def test_writing_over_a_file_replaces_it_and_keeps_its_permissions(file: Path) -> None:
    file.chmod(0o640)
    write_container(file, SECTIONS[:1], [ModeEntry("w8a8", 8, 8, ("meta",))], {})
    assert file.stat().st_mode & 0o777 == 0o640
    with Container.open(file) as container:
        assert container.available == ("w8a8",)
    assert os.listdir(file.parent) == [file.name]


def test_a_new_file_gets_the_permissions_that_the_umask_allows(file: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    assert file.stat().st_mode == plain.stat().st_mode


def test_writing_through_a_link_keeps_the_link(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.qcm"
    link.symlink_to(file)
    write_container(link, SECTIONS[:1], [ModeEntry("w8a8", 8, 8, ("meta",))], {})
    assert link.is_symlink()
    with Container.open(file) as container:
        assert container.available == ("w8a8",)


def fail_with(error: BaseException) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    return fail


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file_and_no_other(
    file: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    before = file.read_bytes()
    monkeypatch.setattr(os, step, fail_with(error))
    expected = FileAccessError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_container(file, SECTIONS[:1], [ModeEntry("w8a8", 8, 8, ("meta",))], {})
    monkeypatch.undo()
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_a_write_protected_file_is_not_replaced(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()
    # Root may write everywhere, so the answer of the system is replaced too.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(FileAccessError, match="write-protected"):
        write_container(file, SECTIONS[:1], [ModeEntry("w8a8", 8, 8, ("meta",))], {})
    assert file.read_bytes() == before


@pytest.mark.parametrize("path", ["no folder/model.qcm", "folder", "nul\0.qcm", "n" * 300])
def test_a_path_that_cannot_be_written_gives_one_line_and_leaves_nothing(path: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileAccessError, match="cannot write") as caught:
        write_container(f"{tmp_path}/{path}", SECTIONS, MODES, MODEL)
    assert "\n" not in str(caught.value)
    assert repr(f"{tmp_path}/{path}") in str(caught.value)
    assert os.listdir(tmp_path) == ["folder"]
