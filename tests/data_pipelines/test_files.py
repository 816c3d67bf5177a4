"""Files are whole or not there, and a disk that cannot take them is named."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from data_pipelines.errors import TRY_AGAIN, UserError
from data_pipelines.files import make_writable, write, writing


def test_a_file_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "new" / "film.mp4"
    with writing(target) as unfinished:
        unfinished.write_bytes(b"half")
        assert not target.exists()
        assert unfinished.suffix == ".mp4"  # by which programs tell the format
        unfinished.write_bytes(b"whole")
    assert target.read_bytes() == b"whole"
    assert os.listdir(target.parent) == ["film.mp4"]
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def fail_half_way(path, error: Exception) -> None:
    with writing(path) as unfinished:
        unfinished.write_text("half")
        raise error


def test_what_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path):
    write(tmp_path / "a.txt", "old")
    with pytest.raises(ZeroDivisionError):
        fail_half_way(tmp_path / "a.txt", ZeroDivisionError())
    assert (tmp_path / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_one_sentence_with_the_name_of_the_file(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(UserError, match=r"a\.rec cannot be written \(No space left on") as caught:
        fail_half_way(tmp_path / "a.rec", full)
    assert caught.value.status == TRY_AGAIN
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("ask", [make_writable, lambda folder: write(folder / "a", b"")])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, ask):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/below.* cannot be written"):
        ask(tmp_path / "file" / "below")


def test_a_new_folder_is_made_and_stays_empty(tmp_path):
    make_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []
