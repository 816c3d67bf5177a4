"""Folders grow, and are written by many machines in parts."""

import memory_bucket  # noqa: F401 (az:// paths)
import pytest
from tiny_captures import DiesAtClip, TinyCaptures, contents

from data_pipelines.errors import MissingFileError, UserError
from data_pipelines.shard_writer import Part, write_shards
from data_pipelines.shards import PreparedSet


def test_a_folder_grows_and_what_was_there_is_not_written_again(tmp_path):
    folder = tmp_path / "tiny"
    write_shards(TinyCaptures(num_clips=3), tmp_path)
    times = {path.name[:31]: path.stat().st_mtime_ns for path in folder.glob("*record-*")}
    assert write_shards(TinyCaptures(num_clips=5), tmp_path).clips == 5
    prepared = PreparedSet(folder)
    assert [prepared.frame(i).sequence for i in range(0, 25, 5)] == [f"s{i}" for i in range(5)]
    now = {path.name[:31]: path.stat().st_mtime_ns for path in folder.glob("*record-*")}
    assert len(now) == 5
    assert all(path.name.endswith("-of-00005") for path in folder.glob("*record-*"))
    assert {name: now[name] for name in times} == times


def test_growing_that_was_killed_goes_on(tmp_path):
    write_shards(TinyCaptures(num_clips=1), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write_shards(DiesAtClip(), tmp_path)
    assert write_shards(TinyCaptures(), tmp_path).clips == 4
    assert PreparedSet(tmp_path / "tiny").frame(15).sequence == "s3"


def test_parts_written_in_any_order_are_the_whole(tmp_path):
    captures = TinyCaptures(num_clips=7)
    write_shards(captures, tmp_path / "whole")
    for number in (3, 1):
        assert write_shards(captures, tmp_path / "parts", part=Part(number, 3)) is None
        with pytest.raises(MissingFileError, match="no finished data set"):
            PreparedSet(tmp_path / "parts" / "tiny")
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts/tiny").glob("*record*")}
    assert len(shards) == 5
    write_shards(captures, tmp_path / "parts", part=Part(2, 3))
    assert write_shards(captures, tmp_path / "parts").clips == 7
    assert contents(tmp_path / "parts" / "tiny") == contents(tmp_path / "whole" / "tiny")
    assert {path: path.stat().st_mtime_ns for path in shards} == shards  # merged, not written anew


def test_a_part_leaves_alone_what_another_is_writing(tmp_path):
    write_shards(TinyCaptures(), tmp_path, part=Part(1, 2))
    unfinished = tmp_path / "tiny/parts/.77.tiny-train.array_record-00001-of-00004"
    unfinished.touch()
    write_shards(TinyCaptures(), tmp_path, part=Part(1, 2))
    assert unfinished.exists()
    write_shards(TinyCaptures(), tmp_path, part=Part(2, 2))
    assert not unfinished.exists()


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "a/b", "-1/4"])
def test_parts_that_are_none(text):
    with pytest.raises(UserError, match="expected K/N"):
        Part.of(text)
