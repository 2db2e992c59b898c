from __future__ import annotations

import os
from pathlib import Path

import pytest

from kaleidoscope.files import json_text, make_folder, replacing


def test_what_was_there_stays_until_the_new_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with replacing(path) as new:
        new.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def write(new: Path) -> None:
        new.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), replacing(path) as new:
        write(new)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_takes_a_place_and_its_place_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, synced = tmp_path / "a", os.fsync, list[tuple[str, bool]]()

    def fsync(handle: int) -> None:
        of = Path(f"/proc/self/fd/{handle}").readlink()
        synced.append(("folder" if of == tmp_path else "file", path.exists()))
        real(handle)

    monkeypatch.setattr("os.fsync", fsync)
    with replacing(path) as new:
        new.write_bytes(b"a")
    assert synced == [("file", False), ("folder", True)]


def test_folders_are_made_with_those_they_are_in(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    make_folder(folder)
    make_folder(folder)
    assert folder.is_dir()


def test_numbers_that_json_lacks_are_refused() -> None:
    assert json_text({"é": None}) == '{\n "é": null\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        json_text([float("nan")])
