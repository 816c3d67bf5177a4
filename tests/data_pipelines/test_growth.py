"""Folders grow, are brought up to date, and are written by many machines in parts."""

import dataclasses
import shutil

import pytest
from memory_bucket import MemoryBucket
from tiny_captures import DiesAtClip, TinyCaptures, contents

from data_pipelines import prepared_folder, reindex
from data_pipelines.errors import MissingFileError, UserError
from data_pipelines.numpy_files import to_npz
from data_pipelines.shard_writer import Part, write_shards
from data_pipelines.shards import PreparedSet


def shards(folder) -> dict[str, int]:
    """When each shard was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*record-*")}


def to_oldest_form(folder) -> None:
    """As folders were written before they could grow: one file of an index, shards' number in
    their names, nothing kept for growing."""
    index = dataclasses.asdict(PreparedSet(folder).index)
    del index["record_end"]
    (folder / "index.npz").write_bytes(to_npz(index))
    (folder / "index.json").unlink()
    for beside in ("index", "parts"):
        shutil.rmtree(folder / beside)
    paths = list(folder.glob("*record-*"))
    for path in paths:
        path.rename(f"{path}-of-{len(paths):05d}")


def test_a_folder_grows_and_what_was_there_is_not_written_again(tmp_path):
    folder = tmp_path / "tiny"
    write_shards(TinyCaptures(num_clips=3), tmp_path)
    before = shards(folder)
    assert write_shards(TinyCaptures(num_clips=5), tmp_path).clips == 5
    prepared = PreparedSet(folder)
    assert [prepared.frame(i).sequence for i in range(0, 25, 5)] == [f"s{i}" for i in range(5)]
    assert len(shards(folder)) == 5
    assert shards(folder).items() >= before.items()


def test_a_folder_of_the_oldest_form_grows_likewise(tmp_path):
    folder = tmp_path / "tiny"
    write_shards(TinyCaptures(num_clips=3), tmp_path)
    before = shards(folder)
    to_oldest_form(folder)
    assert write_shards(TinyCaptures(num_clips=5), tmp_path).clips == 5
    assert shards(folder).items() >= before.items()
    write_shards(TinyCaptures(num_clips=3), tmp_path / "whole")
    write_shards(TinyCaptures(num_clips=5), tmp_path / "whole")
    assert contents(folder) == contents(tmp_path / "whole" / "tiny")


def test_reindex_makes_of_an_old_folder_what_is_written_today(tmp_path, capsys):
    folder = tmp_path / "tiny"
    write_shards(TinyCaptures(num_clips=3), tmp_path)
    today, before = contents(folder), shards(folder)
    to_oldest_form(folder)
    assert PreparedSet(folder).frame(7).sequence == "s1"
    assert reindex.main([str(tmp_path)]) == 0
    assert f"{folder}: brought up to date" in capsys.readouterr().out
    assert contents(folder) == today
    assert shards(folder) == before
    assert reindex.main([str(folder)]) == 0
    assert f"{folder}: is up to date" in capsys.readouterr().out


def test_reindex_that_was_killed_goes_on(tmp_path, monkeypatch):
    write_shards(TinyCaptures(num_clips=3), tmp_path)
    today = contents(tmp_path / "tiny")
    to_oldest_form(tmp_path / "tiny")
    first = tmp_path / "tiny" / "tiny-train.array_record-00000"
    first.with_name(f"{first.name}-of-00003").rename(first)  # killed while it gave new names
    with monkeypatch.context() as killed:
        killed.setattr(reindex, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reindex.reindex(tmp_path / "tiny")
    assert PreparedSet(tmp_path / "tiny").frame(7).sequence == "s1"
    reindex.reindex(tmp_path / "tiny")
    assert contents(tmp_path / "tiny") == today


def test_of_an_old_folder_in_a_bucket_reindex_finds_where_records_lie(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXAVATAR_CACHE", str(tmp_path / "cache"))
    write_shards(TinyCaptures(num_clips=3), tmp_path)
    record = PreparedSet(tmp_path / "tiny").record(7)
    to_oldest_form(tmp_path / "tiny")
    MemoryBucket().put(str(tmp_path / "tiny"), "az://old/tiny", recursive=True)
    with pytest.raises(
        UserError, match=r"run `python -m data_pipelines.reindex az://old/tiny` once"
    ):
        PreparedSet("az://old/tiny").record(7)
    assert reindex.reindex("az://old/tiny")
    assert PreparedSet("az://old/tiny").record(7) == record


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
    before = shards(tmp_path / "parts" / "tiny")
    assert len(before) == 5
    write_shards(captures, tmp_path / "parts", part=Part(2, 3))
    assert write_shards(captures, tmp_path / "parts").clips == 7
    assert contents(tmp_path / "parts" / "tiny") == contents(tmp_path / "whole" / "tiny")
    assert shards(tmp_path / "parts" / "tiny").items() >= before.items()  # merged, not written anew


def test_a_part_leaves_alone_what_another_is_writing(tmp_path):
    write_shards(TinyCaptures(), tmp_path, part=Part(1, 2))
    unfinished = tmp_path / "tiny/parts/.77.tiny-train.array_record-00001"
    unfinished.touch()
    write_shards(TinyCaptures(), tmp_path, part=Part(1, 2))
    assert unfinished.exists()
    write_shards(TinyCaptures(), tmp_path, part=Part(2, 2))
    assert not unfinished.exists()


def test_machines_that_begin_at_the_same_moment_do_not_take_each_other_for_strangers(
    tmp_path, monkeypatch
):
    """Another's settings are written between this one's two looks at the folder."""
    list_folder, looks = prepared_folder.list_folder, []

    def begun_meanwhile(folder):
        looks.append(folder)
        if len(looks) == 1:
            write_shards(TinyCaptures(), tmp_path, part=Part(2, 2))
        return list_folder(folder)

    monkeypatch.setattr(prepared_folder, "list_folder", begun_meanwhile)
    write_shards(TinyCaptures(), tmp_path, part=Part(1, 2))
    assert len(looks) == 2


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "a/b", "-1/4"])
def test_parts_that_are_none(text):
    with pytest.raises(UserError, match="expected K/N"):
        Part.of(text)
