"""Captures become shards that TFDS reads, whatever the workers and however often it is killed."""

import dataclasses
import os
import signal
import sys
import threading

import fsspec
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from tiny_captures import TinyCaptures, expression, frame

from data_pipelines.errors import MissingFileError, UserError
from data_pipelines.record import FrameError
from data_pipelines.shard_writer import jaw_angle, write_shards
from data_pipelines.shards import PreparedSet


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_frames_come_back_as_written(tmp_path):
    captures = TinyCaptures(cameras=2, size=64)
    write_shards(captures, tmp_path, quality=100)
    prepared = PreparedSet(tmp_path / "tiny")
    written = [f for i in range(captures.num_clips) for f in captures.clip(i)]
    assert len(prepared) == len(written) == 40
    for i in (0, 7, 39):
        read = prepared.frame(i)
        for field in dataclasses.fields(read):
            expected, found = getattr(written[i], field.name), getattr(read, field.name)
            if field.name == "image":
                assert np.abs(found.astype(int) - expected).max() <= 4
            else:
                np.testing.assert_array_equal(found, expected)


def test_index_knows_every_frame(tmp_path):
    write_shards(TinyCaptures(cameras=2), tmp_path)
    prepared = PreparedSet(tmp_path / "tiny")
    index = prepared.index
    for i in range(len(prepared)):
        read, clip = prepared.frame(i), index.clip_of(i)
        assert (index.person[clip], index.sequence[clip]) == (read.person, read.sequence)
        assert index.camera_names[index.camera[i]] == read.camera
        assert index.timestep[i] == read.timestep
        assert index.jaw[i] == pytest.approx(0.1 * (read.timestep % 4), abs=1e-6)
    assert index.image_size == 16


def test_tfds_reads_the_folder_without_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    write_shards(TinyCaptures(), tmp_path)
    builder = tfds.builder_from_directory(tmp_path / "tiny")
    source = builder.as_data_source(split="train")
    prepared = PreparedSet(tmp_path / "tiny")
    assert len(source) == len(prepared)
    ours, theirs = prepared.frame(7), source[7]
    np.testing.assert_array_equal(theirs["mask"][..., 0], ours.mask)
    # Two JPEG decoders may round differently.
    assert np.abs(theirs["image"].astype(int) - ours.image).max() <= 3
    np.testing.assert_array_equal(theirs["cam2head"], ours.cam2head)
    np.testing.assert_array_equal(theirs["expression"], ours.expression)
    assert theirs["person"].decode() == ours.person
    assert "tensorflow" not in sys.modules


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path):
    captures = TinyCaptures(num_clips=6)
    write_shards(captures, tmp_path / "one", workers=1)
    write_shards(captures, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one" / "tiny") == contents(tmp_path / "two" / "tiny")


@dataclasses.dataclass(frozen=True)
class DiesAtClip(TinyCaptures):
    dies_at: int = 3

    def clip(self, i: int):
        if i == self.dies_at:
            raise KeyboardInterrupt
        return super().clip(i)


def test_killed_preparation_goes_on_and_redoes_no_finished_shard(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_shards(DiesAtClip(), tmp_path / "killed")
    with pytest.raises(MissingFileError, match="no finished data set"):
        PreparedSet(tmp_path / "killed" / "tiny")
    shards = sorted((tmp_path / "killed" / "tiny").glob("*.array_record-*"))
    times = [s.stat().st_mtime_ns for s in shards]
    assert len(shards) == 3
    write_shards(TinyCaptures(), tmp_path / "killed")
    write_shards(TinyCaptures(), tmp_path / "whole")
    assert contents(tmp_path / "killed" / "tiny") == contents(tmp_path / "whole" / "tiny")
    assert [s.stat().st_mtime_ns for s in shards] == times


def test_folder_of_other_settings_is_left_alone(tmp_path):
    write_shards(TinyCaptures(), tmp_path, {"seed": 0})
    before = contents(tmp_path / "tiny")
    with pytest.raises(UserError, match="was prepared with seed 0, not 1"):
        write_shards(TinyCaptures(), tmp_path, {"seed": 1})
    assert contents(tmp_path / "tiny") == before


@dataclasses.dataclass(frozen=True)
class RenamedClip(TinyCaptures):
    def clip_name(self, i: int) -> str:
        return "another" if i == 3 else super().clip_name(i)


def test_as_many_clips_of_other_names_are_other_captures(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_shards(DiesAtClip(), tmp_path)
    with pytest.raises(UserError, match=r"was prepared with clips 4 \(names hashed: .* not 4"):
        write_shards(RenamedClip(), tmp_path)


def test_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "thesis.tex").write_text("...")
    with pytest.raises(UserError, match="no prepared data set"):
        write_shards(TinyCaptures(), tmp_path)
    assert list(contents(tmp_path / "tiny")) == ["thesis.tex"]


def test_summary_says_what_was_left_out_and_why(tmp_path):
    summary = write_shards(TinyCaptures(skip=(1,), bad_frames=(2,)), tmp_path)
    assert (summary.people, summary.clips, summary.frames) == (2, 3, 12)
    assert summary.clips_left_out == {"its calibration is missing": 1}
    assert summary.frames_left_out == {"K: it holds a number that is not finite": 3}
    assert "left out 1 clips: its calibration is missing" in str(summary)
    assert len(PreparedSet(tmp_path / "tiny")) == 12


def test_what_was_left_out_is_tried_again_when_asked_for(tmp_path):
    write_shards(TinyCaptures(skip=(1,)), tmp_path / "mended")
    shards = sorted((tmp_path / "mended" / "tiny").glob("*.array_record-*"))
    times = [s.stat().st_mtime_ns for s in shards]
    assert write_shards(TinyCaptures(), tmp_path / "mended").clips == 3
    assert write_shards(TinyCaptures(), tmp_path / "mended", retry=True).clips == 4
    redone = [s.stat().st_mtime_ns for s in shards]
    assert [a == b for a, b in zip(times, redone, strict=True)] == [True, False, True, True]
    write_shards(TinyCaptures(), tmp_path / "whole")
    assert contents(tmp_path / "mended" / "tiny") == contents(tmp_path / "whole" / "tiny")
    # Nothing is left to try again: all stays as it is.
    write_shards(TinyCaptures(), tmp_path / "mended", retry=True)
    assert [s.stat().st_mtime_ns for s in shards] == redone


def test_a_frame_that_was_left_out_is_tried_again_too(tmp_path):
    write_shards(TinyCaptures(bad_frames=(2,)), tmp_path)
    assert write_shards(TinyCaptures(), tmp_path, retry=True).frames == 20


@dataclasses.dataclass(frozen=True)
class UnreadableClip(TinyCaptures):
    def clip(self, i: int):
        if i == 2:
            raise OSError("video.mp4 is no video")
        return super().clip(i)


def test_clip_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"clip s2 of tiny: video.mp4 is no video"):
        write_shards(UnreadableClip(), tmp_path)


@dataclasses.dataclass(frozen=True)
class KillsItsWorker(TinyCaptures):
    def clip(self, i: int):
        if i == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().clip(i)


def test_killed_worker_is_reported_and_leaves_no_rubbish_behind(tmp_path):
    with pytest.raises(UserError, match="worker process was killed"):
        write_shards(KillsItsWorker(), tmp_path, workers=2)
    write_shards(TinyCaptures(), tmp_path)
    assert len(list((tmp_path / "tiny").iterdir())) == 4 + 5  # shards, and the files beside them


def test_nothing_to_write_is_an_error(tmp_path):
    with pytest.raises(UserError, match="tiny has no clips"):
        write_shards(TinyCaptures(num_clips=0), tmp_path)
    assert not (tmp_path / "tiny").exists()


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no frame is left .* its calibration .* --retry"):
        write_shards(TinyCaptures(num_clips=2, skip=(0, 1)), tmp_path)
    assert write_shards(TinyCaptures(num_clips=2), tmp_path, retry=True).clips == 2


@dataclasses.dataclass(frozen=True)
class MixedClip(TinyCaptures):
    def clip(self, i: int):
        yield frame(person="a")
        yield frame(person="b")


def test_clip_of_two_people_is_an_error(tmp_path):
    with pytest.raises(UserError, match="clip s0 of tiny: it mixes people"):
        write_shards(MixedClip(), tmp_path)


def test_missing_and_cut_shards_are_named_at_the_start(tmp_path):
    write_shards(TinyCaptures(), tmp_path)
    shard = sorted((tmp_path / "tiny").glob("*.array_record-*"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1000])
    with pytest.raises(UserError, match=shard.name):
        PreparedSet(tmp_path / "tiny")
    shard.unlink()
    with pytest.raises(MissingFileError, match=f"{shard.name} is missing: .* prepare it again"):
        PreparedSet(tmp_path / "tiny")


def test_a_damaged_folder_is_not_taken_for_a_finished_one(tmp_path):
    write_shards(TinyCaptures(), tmp_path)
    folder = tmp_path / "tiny"
    whole = contents(folder)

    def assert_named(file: str, expected: str) -> None:
        with pytest.raises(UserError, match=expected) as error:
            write_shards(TinyCaptures(), tmp_path)
        assert "prepare it again" in str(error.value)
        (folder / file).write_bytes(whole[file])

    shard = next(name for name in whole if "array_record" in name)
    for file in (shard, "summary.json"):
        (folder / file).unlink()
        assert_named(file, f"tiny/{file} is missing")
    for file in ("settings.json", "summary.json"):
        (folder / file).write_bytes(whole[file][:-5])
        assert_named(file, f"tiny/{file} is damaged")
    write_shards(TinyCaptures(), tmp_path)


@pytest.mark.parametrize("file", ["index.npz", "settings.json"])
def test_damaged_index_is_named(tmp_path, file):
    write_shards(TinyCaptures(), tmp_path)
    whole = (tmp_path / "tiny" / file).read_bytes()
    (tmp_path / "tiny" / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"settings.json of {tmp_path}/tiny is damaged"):
        PreparedSet(tmp_path / "tiny")


def test_flipped_bits_of_the_index_are_found(tmp_path):
    write_shards(TinyCaptures(), tmp_path)
    path = tmp_path / "tiny" / "index.npz"
    whole, jaw = path.read_bytes(), PreparedSet(tmp_path / "tiny").index.jaw.tobytes()
    flipped = bytearray(whole)
    flipped[whole.index(jaw) + 5] ^= 4
    path.write_bytes(flipped)
    with pytest.raises(UserError, match="is damaged"):
        PreparedSet(tmp_path / "tiny")


def test_threads_share_a_set(tmp_path):
    write_shards(TinyCaptures(), tmp_path)
    prepared = PreparedSet(tmp_path / "tiny")
    expected = [prepared.record(i) for i in range(len(prepared))]
    found = [None] * 8
    again = PreparedSet(tmp_path / "tiny")

    def read(thread: int):
        found[thread] = [again.record(i) for i in range(len(again))]

    threads = [threading.Thread(target=read, args=(t,)) for t in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(f == expected for f in found)


def test_jaw_angle_is_the_opening():
    assert jaw_angle(expression(0.0)) == pytest.approx(0.0, abs=1e-6)
    assert jaw_angle(expression(0.25)) == pytest.approx(0.25, abs=1e-6)
    with pytest.raises(FrameError, match="jaw is no rotation"):
        jaw_angle(np.zeros(135, np.float32))


class Bucket(MemoryFileSystem):
    """An in-memory stand-in for S3."""

    protocol = "s3"
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("s3://"))


def test_a_bucket_serves_as_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXAVATAR_CACHE", str(tmp_path / "cache"))
    fsspec.register_implementation("s3", Bucket, clobber=True)
    write_shards(TinyCaptures(), "s3://bucket/data")
    write_shards(TinyCaptures(), tmp_path / "local")
    remote, local = PreparedSet("s3://bucket/data/tiny"), PreparedSet(tmp_path / "local" / "tiny")
    assert [remote.record(i) for i in range(20)] == [local.record(i) for i in range(20)]
    assert (epath.Path("s3://bucket/data/tiny") / "dataset_info.json").exists()
    assert not (epath.Path("s3://bucket/data/tiny") / "parts").exists()


def test_a_bucket_written_anew_is_read_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXAVATAR_CACHE", str(tmp_path / "cache"))
    fsspec.register_implementation("s3", Bucket, clobber=True)
    first = PreparedSet(write_to_bucket("s3://other", quality=95)).record(0)
    epath.Path("s3://other/tiny").rmtree()
    second = PreparedSet(write_to_bucket("s3://other", quality=20)).record(0)
    assert first != second


def write_to_bucket(root: str, quality: int) -> str:
    write_shards(TinyCaptures(), root, quality=quality)
    return f"{root}/tiny"
